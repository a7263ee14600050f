"""Scenes of drawings: their masks and boxes are exact, and the same on every machine."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.class_names import read_class_names, read_templates
from data.dense.layouts import load_dense
from data.errors import UsageError
from data.scenes.build import SPLITS, build_scenes, run_lengths
from data.scenes.compose import LEAST_SEEN, compose, render_cut_out
from data.scenes.grounds import PATTERNS, draw_ground

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path fill="{}" d="{}"/></svg>'
DRAWINGS = [
    [SQUARE.format("#f00", "M0 0h4v4H0z")],
    [SQUARE.format("#0f0", "M1 0h2v4H1z"), SQUARE.format("#0f0", "M0 1h4v2H0z")],
    [SQUARE.format("#00f", "M0 0h4v1H0z")],
]


def annotations(folder: Path) -> dict:
    return json.loads((folder / "annotations.json").read_text())


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def decoded(segmentation: dict) -> np.ndarray:
    """Uncompressed run lengths of COCO, by hand."""
    height, width = segmentation["size"]
    values = np.arange(len(segmentation["counts"])) % 2
    return np.repeat(values, segmentation["counts"]).reshape(width, height).T.astype(bool)


def test_masks_boxes_and_run_lengths_say_the_same(small_scenes):
    for split in SPLITS:
        found = annotations(small_scenes / split)
        names = read_class_names(small_scenes / split / "classnames.txt")
        assert [c["name"] for c in found["categories"]] == names
        assert read_templates(small_scenes / split / "zeroshot_classification_templates.txt")
        assert len(found["images"]) == 3
        for image in found["images"]:
            mask = read(small_scenes / split / "masks" / image["file_name"])
            assert read(small_scenes / split / "images" / image["file_name"]).shape == (64, 64, 3)
            again = np.zeros_like(mask)
            for thing in found["annotations"]:
                if thing["image_id"] == image["id"]:
                    seen = decoded(thing["segmentation"])
                    assert not again[seen].any()  # no pixel belongs to two
                    again[seen] = thing["category_id"]
                    assert seen.sum() == thing["area"] > 0
                    left, top, width, height = thing["bbox"]
                    inside = np.zeros_like(seen)
                    inside[top : top + height, left : left + width] = True
                    assert not (seen & ~inside).any()
                    for edge in (seen[top], seen[top + height - 1]):
                        assert edge.any()
                    for edge in (seen[:, left], seen[:, left + width - 1]):
                        assert edge.any()
            assert np.array_equal(again, mask)


def test_held_out_concepts_and_style_are_apart(small_scenes):
    names = {s: set(read_class_names(small_scenes / s / "classnames.txt")) for s in SPLITS}
    assert names["train"] == names["heldout_style"]
    assert not names["train"] & names["heldout_captions"]


def test_boxes_alone_show_every_trained_thing_and_no_held_out_one(tmp_path):
    sizes = {"size": 64, "num_classes": 20, "progress": False}
    out = build_scenes(tmp_path / "boxes", count=2, boxes=True, **sizes)
    train, masks = load_dense(out / "train"), load_dense(out / "heldout_captions")
    assert len(train.class_names) > 254  # more than masks of 8 bits hold
    assert not set(train.class_names) & set(masks.class_names)
    for picture in train:
        assert picture.mask is None
        assert picture.boxes
    assert all(picture.mask is not None for picture in masks)
    with pytest.raises(UsageError, match="kinds and boxes"):
        build_scenes(tmp_path / "both", kinds=True, boxes=True, **sizes)


def test_a_scene_is_a_function_of_its_seed_alone(small_scenes, tmp_path):
    again = build_scenes(tmp_path / "again", count=2, size=64, num_classes=20, progress=False)
    for split in SPLITS:
        for name in ("images", "masks"):
            first, second = (small_scenes / split / name / f"00000{n}.png" for n in (0, 1))
            assert first.read_bytes() == (again / split / name / first.name).read_bytes()
            assert first.read_bytes() != second.read_bytes()
    assert build_scenes(small_scenes, count=3, size=64, num_classes=20) == small_scenes


def test_masks_are_where_the_drawings_pixels_are():
    for seed in range(20):
        scene = compose(DRAWINGS, 100, np.random.default_rng(seed))
        for thing in scene.things:
            colour = np.eye(3)[thing.label - 1] * 255
            off = np.abs(scene.picture - colour).max(-1)
            assert off[thing.seen].max() <= 128  # its own, or mixed at its edge
            assert np.median(off[thing.seen]) == 0
            rest = off[scene.mask == 0]
            assert rest.min() > 0  # the ground has no pixel of it


def test_no_thing_is_hidden_for_the_most_part():
    for seed in range(30):
        scene = compose(DRAWINGS, 80, np.random.default_rng(seed))
        for thing in scene.things:
            width, height = thing.box[2:]
            assert thing.seen.sum() >= LEAST_SEEN * 0.2 * 80 * 4  # of the thinnest at its least
            assert min(width, height) > 0


def test_every_ground_has_texture_and_no_strong_colour():
    for seed in range(3 * len(PATTERNS)):
        ground = draw_ground(48, np.random.default_rng(seed)).astype(int)
        assert ground.std() > 1
        assert np.median(ground.max(-1) - ground.min(-1)) < 0.55 * 255


def test_a_cut_out_is_transparent_around_the_drawing():
    rgba = render_cut_out(DRAWINGS[1][0], 8)
    assert (rgba[:, 2:6, 3] == 255).all()
    assert not rgba[:, [0, 1, 6, 7], 3].any()


def test_run_lengths_go_down_the_columns():
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert run_lengths(mask) == [0, 2, 1, 1, 2]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"count": 0}, "at least one scene"),
        ({"seed": -1}, "seed -1: at least 0"),
        ({"size": 8}, "at least 32 pixels"),
        ({"num_classes": 255}, "2 to 254"),
        ({"num_classes": 250}, "there are"),
    ],
)
def test_impossible_values_are_refused(values, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        build_scenes(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_kept(small_scenes, tmp_path):
    with pytest.raises(UsageError, match="built with count 3, not 4"):
        build_scenes(small_scenes, count=4, size=64, num_classes=20)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a folder of scenes"):
        build_scenes(tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
