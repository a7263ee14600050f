"""Decoders over the patches of a locked tower: trained at several patch sizes, used at any."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER
from launcher import ROOT
from PIL import Image
from safetensors.torch import load_file

from contrastive import LitModel, load_vision_tower
from contrastive.dense.config import DecoderConfig, DenseConfig, Kind, PicturesConfig
from contrastive.dense.decoder_folder import load_decoder
from contrastive.dense.decoders import build_decoder
from contrastive.dense.loop import train_decoder
from contrastive.run.config import OptimConfig
from contrastive.vision.config import VisionConfig
from data.dense.layouts import load_dense
from data.errors import UsageError
from retrieval import TrainedSegmenter, evaluate_dense
from retrieval.dense.matched_names import match_names
from retrieval.dense.painted import COVER, LINE, painted, palette

KINDS: tuple[Kind, ...] = ("linear", "mask_transformer", "mlp")
STEPS = 6


def config(out: Path, name: str, scenes: Path, **changes: Any) -> DenseConfig:
    cfg = DenseConfig(
        name=name,
        out=str(out),
        data=PicturesConfig(str(scenes / "train")),
        vision=VisionConfig(tower=TINY_TOWER, features="mean", patch_sizes=(48, 40)),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        global_batch_size=3,
        steps=STEPS,
        log_every=1,
        checkpoint_every=3,
    )
    return replace(cfg, **changes)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def trained(small_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_decoder(
        config(tmp_path_factory.mktemp("decoders"), "whole", small_scenes),
        load_dense(small_scenes / "train"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_reads_any_grid_and_no_patch_sees_another_picture(kind: Kind) -> None:
    torch.manual_seed(0)
    decoder = build_decoder(DecoderConfig(kind, 64), [24, 8], 5).eval()
    for rows, columns in ((1, 1), (3, 5), (16, 16)):
        features = torch.randn(2, rows, columns, 32)
        both = decoder(features)
        assert both.shape == (2, 5, rows, columns)
        torch.testing.assert_close(decoder(features[:1]), both[:1])


def test_training_learns_and_is_read_back(trained: Path, small_scenes: Path) -> None:
    found = losses(trained)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    segmenter = TrainedSegmenter.from_pretrained(trained / "model")
    scenes = load_dense(small_scenes / "train")
    assert segmenter.class_names == list(scenes.class_names)
    picture = scenes.pictures.load(0).image.resize((90, 70))
    for size in (48, 24):  # at a patch size too that training did not draw
        (mask,) = segmenter.predict(picture, size)
        assert mask.shape == (70, 90)
        (logits,) = segmenter.logits(picture, size)
        assert mask.max() < logits.shape[2] == len(scenes.class_names) + 1
    result = evaluate_dense(segmenter, scenes, [48])
    assert result.num_images == 3


def test_cached_features_train_what_the_tower_trains(
    trained: Path, small_scenes: Path, tmp_path: Path
) -> None:
    data = PicturesConfig(str(small_scenes / "train"), features=str(tmp_path / "features"))
    scenes = load_dense(small_scenes / "train")
    folder = train_decoder(config(tmp_path, "cached", small_scenes, data=data), scenes)
    np.testing.assert_allclose(losses(folder), losses(trained), rtol=1e-2)  # kept in float16
    tower = load_vision_tower(TINY_TOWER, features="cls")
    other = config(tmp_path, "other", small_scenes, data=data)
    with pytest.raises(UsageError, match="were computed with tower"):
        train_decoder(replace(other, vision=replace(other.vision, features="mean@1")), scenes)
    with pytest.raises(UsageError, match="its patches mean something else"):
        load_decoder(folder / "model", tower)


def test_a_resumed_run_ends_with_the_same_weights(
    trained: Path, small_scenes: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = config(tmp_path, "whole", small_scenes)

    def stop(step: int, decoder: object) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        train_decoder(replace(cfg, eval_every=1), scenes, [stop])
    train_decoder(replace(cfg, eval_every=1), scenes, [lambda step, decoder: {}], resume=True)
    expected = load_file(trained / "model" / "model.safetensors")
    found = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_an_evaluation_that_fails_costs_no_training(small_scenes: Path, tmp_path: Path) -> None:
    def fail(step: int, decoder: object) -> dict[str, float]:
        raise InterruptedError

    cfg = config(tmp_path, "run", small_scenes, steps=1, eval_every=1)
    with pytest.raises(InterruptedError):
        train_decoder(cfg, load_dense(small_scenes / "train"), [fail])
    assert load_decoder(tmp_path / "run" / "model").patch_sizes == (48, 40)


def test_what_cannot_work_is_said_before_anything_is_built(
    small_scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"decoder\.width 100: .*multiples of 64"):
        DecoderConfig("mask_transformer", 100)
    vision = VisionConfig(tower=TINY_TOWER, features="mean", patch_sizes=(47,))
    with pytest.raises(UsageError, match="47"):
        train_decoder(
            config(tmp_path, "run", small_scenes, vision=vision), load_dense(small_scenes / "train")
        )
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_in_cached_features_is_noticed(small_scenes: Path, tmp_path: Path) -> None:
    data = PicturesConfig(str(small_scenes / "train"), features=str(tmp_path / "features"))
    scenes = load_dense(small_scenes / "train")
    train_decoder(config(tmp_path, "first", small_scenes, data=data, steps=1), scenes)
    file = tmp_path / "features" / "p48.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"p48\.npy cannot be read"):
        train_decoder(config(tmp_path, "second", small_scenes, data=data), scenes)
    file.unlink()  # as it says
    train_decoder(config(tmp_path, "second", small_scenes, data=data), scenes)


# ---- what it is good for afterwards ------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(trained: Path) -> TrainedSegmenter:
    return TrainedSegmenter.from_pretrained(trained / "model")


def test_classes_of_another_set_are_matched_by_name(
    segmenter: TrainedSegmenter, small_scenes: Path
) -> None:
    picture = load_dense(small_scenes / "train").pictures.load(0).image
    own, (mask,) = segmenter.class_names, segmenter.predict(picture, 48)
    turned = TrainedSegmenter(segmenter.trained, own[::-1])
    expected = np.where(mask == 0, 0, len(own) + 1 - mask.astype(int))
    assert np.array_equal(turned.predict(picture, 48)[0], expected)
    assert turned.matched.sentence() == ""

    found = int(np.bincount(mask.ravel()).argsort()[-1]) or int(mask.max())
    others = ["a thing of its own", *(name.upper() for n, name in enumerate(own, 1) if n != found)]
    partly = TrainedSegmenter(segmenter.trained, others)
    (other,) = partly.predict(picture, 48)
    assert (other[(mask == found) | (mask == 0)] == 0).all()
    names = np.array(["", *(name.upper() for name in own)])
    rest = (mask != found) & (mask != 0)
    assert np.array_equal(np.array(["", *others])[other[rest]], names[mask[rest]])
    assert partly.matched.unknown == (own[found - 1],)
    assert partly.matched.never_found == ("a thing of its own",)
    with pytest.raises(UsageError, match="none of the decoder's classes"):
        TrainedSegmenter(segmenter.trained, ["a thing of its own"])


def test_of_a_name_that_repeats_the_first_is_the_first() -> None:
    found = match_names(["crane", "cat", "Crane", "crane"], ["dog", "crane", " CRANE", "cat"])
    assert found.labels.tolist() == [0, 2, 4, 3, 0]
    assert (found.unknown, found.never_found) == (("crane",), ("dog",))


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def segment(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """launch/segment.py with the decoder, or what else is its model."""

    def run(*flags: object, model: Path = trained / "model") -> Ran:
        monkeypatch.setattr(sys, "argv", ["segment.py", "--model", str(model), *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "launch" / "segment.py"), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


def test_a_decoder_is_reported_as_a_model_is(
    segment: Callable[..., Ran], small_scenes: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(small_scenes / "heldout_style", tmp_path / "scenes")
    (root / "annotations.json").unlink()
    names = (root / "classnames.txt").read_text().splitlines()
    (root / "classnames.txt").write_text("\n".join([*names[:-1], "another"]))
    code, report, _ = segment("--root", root, "--patch-sizes", 48)
    assert code == 0
    assert [line for line in report.splitlines() if line.split()[:1] == ["48"]]
    assert "scenes: 3 images" in report
    assert f"{names[-1]}, which the decoder finds and the set does not have, counts as" in report
    assert "another, which the decoder does not know, as missed" in report


def test_own_pictures_become_masks_to_look_at(
    segment: Callable[..., Ran], segmenter: TrainedSegmenter, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    picture.save(photos / "one.png")
    (photos / "two.jpg").write_bytes(b"no picture")
    picture.save(photos / "two.png")
    code, said, _ = segment("--pictures", photos, "--out", out)
    assert (code, "not read: unreadable 1" in said) == (0, True)
    with Image.open(out / "patch_40/masks/one.png") as mask:
        assert np.array_equal(np.asarray(mask), segmenter.predict(picture, 40)[0])
        colours = np.asarray(mask.convert("RGB"))
    assert np.array_equal(colours, palette()[segmenter.predict(picture, 40)[0]])
    with Image.open(out / "patch_40/one.jpg") as shown:
        assert shown.width == 240  # room for names, which stand below
        assert shown.height > 50
        pixels = np.asarray(shown.convert("RGB"), np.float32)[:50, :90]
    own, under = np.asarray(picture, np.float32), colours.astype(np.float32)
    mixed = np.where(colours.any(-1, keepdims=True), 0.4 * own + 0.6 * under, own)
    assert colours.any()
    assert np.abs(pixels.mean((0, 1)) - mixed.mean((0, 1))).max() < 4  # JPEG keeps the mean
    assert (out / "patch_40/masks/two.png.png").exists()
    assert (out / "classnames.txt").read_text().splitlines() == segmenter.class_names


def test_colours_are_those_of_pascal_voc() -> None:
    colours = palette()
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[[15, 20, 255]].tolist() == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert len(np.unique(colours, axis=0)) == 256


def test_a_picture_shows_through_its_colours_and_names_stand_below_in_theirs() -> None:
    grey, names = np.full((40, 300, 3), 100, np.uint8), ["lemon", "ship", "moon"]
    mask = np.zeros((40, 300), np.uint8)
    mask[:, :60], mask[:, 60:200] = 1, 3
    sheet = np.asarray(painted(Image.fromarray(grey), mask, names))
    assert sheet.shape == (40 + LINE, 300, 3)
    for column, label in ((0, 1), (59, 1), (60, 3), (199, 3)):
        mixed = (1 - COVER) * 100 + COVER * palette()[label].astype(float)
        assert np.abs(sheet[20, column] - mixed).max() <= 0.5
    assert (sheet[:40, 200:] == 100).all()  # background
    shown = [tuple(pixel) for pixel in sheet[40 + LINE // 2]]
    squares = [shown.index(tuple(palette()[label])) for label in (3, 1)]  # the largest first
    assert squares == sorted(squares)
    assert tuple(palette()[2]) not in shown  # there is no ship


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--root", "ROOT", "--background", "0.1"], "--background is of cosines"),
        (["--root", "ROOT", "--pictures", "ROOT"], "give --root FOLDER, a data set"),
        (["--pictures", "ROOT/images"], "need a folder for their masks"),
        (["--pictures", "ROOT/nowhere", "--out", "OUT"], "nowhere: there is no picture"),
        (
            ["--pictures", "ROOT/classnames.txt", "--out", "OUT"],
            "none could be used (unreadable 1)",
        ),
        (["--root", "ROOT", "--patch-sizes", "47"], "47"),
        (
            ["--pictures", "ROOT/images", "--out", "OUT", "--class-names", "a"],
            "--class-names: a decoder has its own",
        ),
        (
            ["--root", "ROOT", "--windows", "2", "--shorter-side", "96"],
            "--shorter-side is of patches, which windows do without",
        ),
    ],
)
def test_what_a_decoder_cannot_do_is_one_sentence(
    flags: list[str], says: str, segment: Callable[..., Ran], small_scenes: Path, tmp_path: Path
) -> None:
    places = {"ROOT": str(small_scenes / "train"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    ran = segment(*flags)
    assert ran.code == 2
    assert says in ran.err


def test_other_folders_are_named_for_what_they_are(
    trained: Path, segment: Callable[..., Ran], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"of a run, the model is .*model"):
        TrainedSegmenter.from_pretrained(trained)
    with pytest.raises(UsageError, match="is a decoder's"):
        LitModel.from_pretrained(trained / "model")
    ran = segment("--pictures", ROOT / "docs", "--out", tmp_path, model=trained)
    assert (ran.code, f"of a run, it is {trained / 'model'}" in ran.err) == (2, True)


def test_a_picture_that_changed_in_place_is_noticed(small_scenes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(small_scenes / "train", tmp_path / "scenes")
    data = PicturesConfig(str(root), features=str(tmp_path / "features"))
    train_decoder(config(tmp_path, "first", small_scenes, data=data, steps=1), load_dense(root))
    file = root / "images/000001.png"
    os.utime(file, (1, 1))
    train_decoder(config(tmp_path, "second", small_scenes, data=data, steps=1), load_dense(root))
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1  # in what ends the file; its name and size stay
    file.write_bytes(changed)
    with pytest.raises(UsageError, match=r"000001\.png has changed since the features in"):
        train_decoder(config(tmp_path, "third", small_scenes, data=data), load_dense(root))


def test_sets_that_teach_nothing_are_refused(small_scenes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(small_scenes / "train", tmp_path / "scenes")
    cfg = config(tmp_path, "run", root, steps=3)
    train_decoder(cfg, load_dense(root))
    names = (root / "classnames.txt").read_text().splitlines()
    scenes = load_dense(root)
    turned = replace(scenes, class_names=[names[1], names[0], *names[2:]])
    with pytest.raises(UsageError, match=f"other classes: {names[0]} is now {names[1]}"):
        train_decoder(replace(cfg, steps=4), turned, resume=True)
    shutil.rmtree(root / "masks")
    (root / "masks").mkdir()
    (root / "annotations.json").unlink()
    with pytest.raises(UsageError, match=r"none of the first 3 pictures .* \(no_mask 3\)"):
        train_decoder(config(tmp_path, "none", root), load_dense(root))
    assert not (tmp_path / "none").exists()
