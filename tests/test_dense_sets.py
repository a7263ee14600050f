"""Sets with masks and boxes: what published layouts say, bad input counted, others refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from dense_trees import (
    SIZE,
    save_mask,
    save_picture,
    write_ade20k,
    write_coco,
    write_panoptic,
    write_voc,
)
from PIL import Image

from data.dense.layouts import load_dense
from data.dense.picture import PartLabels, TrueBox
from data.errors import DataError, UsageError
from retrieval import evaluate_dense
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.evaluate_dense import DenseCollector
from retrieval.dense.matched_names import match_names


def columns(*values: int) -> list[int]:
    """The first row of a mask as `save_mask` writes it."""
    return np.repeat(values, SIZE[0] // len(values)).tolist()


# ---- layouts -----------------------------------------------------------------------------------


def test_ade20k_counts_nothing_where_it_is_unlabelled(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    for root in (tmp_path, tmp_path / "ADEChallengeData2016"):
        dataset = load_dense(root)
        assert dataset.class_names == ["wall", "building", "sky"]
        assert not dataset.background
        (picture,) = dataset
        assert picture.mask[0].tolist() == columns(255, 1, 3)
        assert picture.key.endswith("images/validation/ADE_00000001.jpg")
    (picture,) = load_dense(tmp_path, split="training")
    assert picture.key.endswith("images/training/ADE_00000000.jpg")
    with pytest.raises(UsageError, match="splits of ADE20K are validation and training"):
        load_dense(tmp_path, split="test")


def test_voc_has_a_background_and_edges_that_do_not_count(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    for root in (tmp_path, folder.parent, folder):
        dataset = load_dense(root)
        assert (len(dataset.class_names), dataset.class_names[19]) == (20, "tv monitor")
        assert dataset.background
        (picture,) = dataset
        assert picture.mask[0].tolist() == columns(0, 20, 255, 1)
    with pytest.raises(UsageError, match=r"trainval\.txt cannot be read"):
        load_dense(tmp_path, split="trainval")


def test_cocos_boxes_are_numbered_by_category_and_counted_where_a_rule_is_for_them(
    tmp_path: Path,
) -> None:
    boxes = {
        "1.jpg": [
            {"category_id": 3, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"category_id": 1, "bbox": [0, 0, 12.004, 8], "iscrowd": 1},
            {"category_id": 1, "bbox": [-1, 0, 5, 5], "iscrowd": 0},
            {"category_id": 1, "bbox": [10, 6, 5, 5]},
            {"category_id": 1, "bbox": [1, 1, 0, 5], "iscrowd": 0},
            {"category_id": 1, "bbox": [10**400, 1, 5, 5], "iscrowd": 0},
            {"category_id": 2, "bbox": [1, 1, 5, 5], "iscrowd": 0},
        ],
        "2.jpg": [],
    }
    dataset = load_dense(write_coco(tmp_path, boxes))
    assert dataset.class_names == ["person", "car", "wall-other-merged"]
    first, second = dataset
    assert first.boxes == (
        TrueBox((1, 2, 3.5, 4), 2),
        TrueBox((0, 0, 12.004, 8), 1, crowd=True),
        TrueBox((-1, 0, 5, 5), 1),
        TrueBox((10, 6, 5, 5), 1),
    )
    assert (second.boxes, second.mask) == ((), None)
    assert dataset.noted == {
        "crowd": 1, "box_outside": 2, "box_empty": 2, "unknown_class": 1, "no_boxes": 1,
    }  # fmt: skip


def test_a_set_that_is_labelled_in_part_is_measured_by_what_is_known(tmp_path: Path) -> None:
    box = {"category_id": 1, "bbox": [1, 1, 5, 5]}
    said = {"neg_category_ids": [3, 77], "not_exhaustive_category_ids": [1]}
    root = write_coco(tmp_path, {"1.jpg": [box], "2.jpg": [box]}, of_picture={"1.jpg": said})
    (file,) = (root / "annotations").iterdir()
    given = json.loads(file.read_text())
    name = given["images"][0].pop("file_name")  # as LVIS has it, beside COCO's folders
    given["images"][0]["coco_url"] = f"http://images/val2017/{name}"
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images/val2017")
    given["images"][1]["file_name"] = "val2017/2.jpg"
    given["categories"][0]["name"] = "baseball_bat"
    file.write_text(json.dumps(given))
    file.rename(file.with_name("instances_val.json"))
    dataset = load_dense(root)
    assert "baseball bat" in dataset.class_names
    first, second = dataset
    assert first.partly == PartLabels(absent=frozenset({2}), incomplete=frozenset({1}))
    assert second.partly is None
    assert dataset.noted == {"partly_labelled": 1}
    wrong = [ScoredBox((0, 0, 2, 2), label, 0.9) for label in (1, 2, 3)]
    found = [ScoredBox((1, 1, 5, 5), 1, 0.5)]
    for picture, expected in ((first, [True]), (second, [False, True])):
        collector = DenseCollector(dataset)
        collector.add_boxes(0, picture, [*wrong, *found])
        judged = collector.precision[0]._scores
        assert [right for _, _, right in judged[1]] == expected
        assert judged[2] == [(0.9, 0, False)]
        assert (3 in judged) is (picture is second)


def test_cocos_segments_are_read_from_colours(tmp_path: Path) -> None:
    infos = [
        {"id": 65538, "category_id": 3, "iscrowd": 0},
        {"id": 300, "category_id": 90, "iscrowd": 0},
        {"id": 7, "category_id": 1, "iscrowd": 1},
    ]
    dataset = load_dense(write_panoptic(tmp_path, [65538, 300, 0, 7], infos))
    assert dataset.class_names == ["person", "car", "wall"]
    assert (dataset.stuff, dataset.noted) == ({3}, {"crowd": 1})
    (picture,) = dataset
    assert picture.mask[0].tolist() == columns(2, 3, 255, 1)
    assert picture.segments.ids[-1].tolist() == columns(65538, 300, 0, 7)
    assert picture.segments.labels == {65538: 2, 300: 3, 7: 1}
    assert picture.segments.crowds == {7}


@pytest.mark.parametrize(
    ("infos", "kind"),
    [
        ([{"id": 1, "category_id": 3}], "segments"),
        ([{"id": i, "category_id": 3} for i in (1, 2, 3)], "segments"),
        ([{"id": 1, "category_id": 3}, {"id": 2, "category_id": 4}], "mask_labels"),
    ],
)
def test_segments_that_are_not_those_of_the_list_are_never_guessed(
    infos: list, kind: str, tmp_path: Path
) -> None:
    dataset = load_dense(write_panoptic(tmp_path, [1, 2], infos))
    assert list(dataset) == []
    assert dataset.skipped == {kind: 1}


def test_lists_of_segments_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="picture 1 has no segments_info"):
        load_dense(write_panoptic(tmp_path, [1, 2], [{"id": [1], "category_id": 3}]))


@pytest.mark.parametrize("masks", ["stuffthingmaps/val2017", "annotations/val2017"])
def test_coco_stuff_leaves_out_what_no_pixel_has(masks: str, tmp_path: Path) -> None:
    names = {0: "unlabeled", 1: "person", 11: "fire hydrant", 12: "street sign", 92: "wall-other"}
    (tmp_path / "labels.txt").write_text("".join(f"{k}: {v}\n" for k, v in names.items()))
    save_picture(tmp_path / "images/val2017/1.jpg")
    save_mask(tmp_path / masks / "1.png", [0, 10, 91, 255])
    save_picture(tmp_path / "images/val2017/2.jpg")
    save_mask(tmp_path / masks / "2.png", [0, 11])
    dataset = load_dense(tmp_path)
    assert dataset.class_names == ["person", "fire hydrant", "wall"]
    (picture,) = dataset
    assert picture.mask[0].tolist() == columns(1, 2, 3, 255)
    assert dataset.skipped == {"mask_labels": 1}


def test_boxes_may_be_of_more_classes_than_masks_hold(tmp_path: Path) -> None:
    many = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(1, 301)]
    one = {"category_id": 300, "bbox": [0, 0, 4, 4]}
    (picture,) = load_dense(write_coco(tmp_path / "boxes", {"1.jpg": [one]}, categories=many))
    assert [true.label for true in picture.boxes] == [300]
    folder = write_panoptic(tmp_path / "panoptic", [1], [])
    file = folder / "annotations/panoptic_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "categories": many}))
    with pytest.raises(UsageError, match="300 categories; masks of 8 bits hold 254"):
        load_dense(folder)
    with pytest.raises(UsageError, match="300 classes; masks of 8 bits hold 254"):
        match_names(["thing 1"], [one["name"] for one in many])


def test_scenes_have_masks_boxes_and_segments_that_agree(small_scenes: Path) -> None:
    dataset = load_dense(small_scenes / "heldout_style")
    assert dataset.background
    assert any("drawing" in template for template in dataset.templates)
    assert len(list(dataset)) == 3
    for picture in dataset:
        segments = picture.segments
        assert (segments.ids > 0).all()
        of_pixels = np.vectorize(segments.labels.get)(segments.ids)
        assert np.array_equal(of_pixels, picture.mask)
        things = {number: label for number, label in segments.labels.items() if label}
        assert list(things.values()) == [box.label for box in picture.boxes]
        for number, true in zip(things, picture.boxes, strict=True):
            rows, across = np.nonzero(segments.ids == number)
            left, top, width, height = true.box
            assert (left, top) == (across.min(), rows.min())
            assert (width, height) == (across.max() + 1 - left, rows.max() + 1 - top)


def test_annotations_that_do_not_fit_their_folder_are_counted(
    small_scenes: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(small_scenes / "heldout_style", tmp_path / "scenes")
    values = json.loads((root / "annotations.json").read_text())
    values["images"][0]["width"] += 1
    first = next(one for one in values["annotations"] if one["image_id"] == 1)
    first["segmentation"]["counts"][:2] = [sum(first["segmentation"]["counts"][:2]), 0]
    (root / "annotations.json").write_text(json.dumps(values))
    dataset = load_dense(root)
    assert len(list(dataset)) == 1
    assert dataset.skipped == {"picture_size": 1, "segments": 1}
    for one in values["annotations"]:
        one["segmentation"] = [[0, 0, 9, 0, 9, 9]]  # a polygon
    (root / "annotations.json").write_text(json.dumps(values))
    assert {picture.segments for picture in load_dense(root)} == {None}
    values["images"].append({**values["images"][0], "id": "again"})
    (root / "annotations.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="lists a picture twice"):
        load_dense(root)
    values["categories"][0]["name"] = "another"
    (root / "annotations.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="has other categories than"):
        load_dense(root)


# ---- recognising -------------------------------------------------------------------------------


def test_a_folder_of_several_sets_asks_which(tmp_path: Path) -> None:
    write_coco(tmp_path, {"1.jpg": []})
    shutil.copy(
        tmp_path / "annotations/instances_val2017.json", tmp_path / "annotations/panoptic_x.json"
    )
    with pytest.raises(UsageError, match=r"holds coco and coco-panoptic; .* dataset=coco"):
        load_dense(tmp_path)
    assert len(load_dense(tmp_path, "coco")) == 1


def test_of_several_splits_the_one_to_evaluate_on_is_taken(tmp_path: Path) -> None:
    write_coco(tmp_path, {"1.jpg": []})
    val, train = (tmp_path / f"annotations/instances_{s}2017.json" for s in ("val", "train"))
    shutil.copy(val, train)
    assert load_dense(tmp_path).pictures.key(0).endswith("val2017/1.jpg")
    with pytest.raises(UsageError, match=r"no images; expected them in .*train2017 or"):
        load_dense(tmp_path, split="train2017")
    with pytest.raises(UsageError, match=r"no instances_x\.json, only val2017, train2017"):
        load_dense(tmp_path, split="x")
    val.rename(val.with_name("instances_a.json"))
    with pytest.raises(UsageError, match="has a, train2017; say which, such as split=a"):
        load_dense(tmp_path)


def test_a_folders_own_texts_replace_the_sets(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    (tmp_path / "classnames.txt").write_text("a wall\nhouse\nclouds\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("the {c} there\n")
    dataset = load_dense(tmp_path)
    assert (dataset.class_names, dataset.templates) == (
        ["a wall", "house", "clouds"],
        ["the {c} there"],
    )
    (tmp_path / "classnames.txt").write_text("wall\n")
    with pytest.raises(UsageError, match="has 1 names, for 3 classes"):
        load_dense(tmp_path)


def test_other_folders_are_refused_by_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no set .* ade20k \(images/.*; voc .*; masks"):
        load_dense(tmp_path)
    with pytest.raises(UsageError, match="unknown data set 'imagenet'; allowed: ade20k"):
        load_dense(tmp_path, "imagenet")
    with pytest.raises(UsageError, match="is not a folder"):
        load_dense(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"objectInfo150\.txt cannot be read"):
        load_dense(tmp_path, "ade20k")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{", "no file of COCO's annotations"),
        ("[]", "no file of COCO's annotations"),
        ({"images": []}, "0 pictures"),
        ({"categories": []}, "0 categories"),
        ({"annotations": [7]}, "an annotation is 7"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1]}]}, "four numbers"),
        ({"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}, "category_id is None"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "an id stands twice"),
    ],
)
def test_files_that_are_not_cocos_are_refused(
    values: dict | str, says: str, tmp_path: Path
) -> None:
    write_coco(tmp_path, {"1.jpg": []}, **(values if isinstance(values, dict) else {}))
    if isinstance(values, str):
        (tmp_path / "annotations/instances_val2017.json").write_text(values)
    with pytest.raises(UsageError, match=says):
        load_dense(tmp_path)


# ---- pictures ----------------------------------------------------------------------------------


def test_pictures_that_cannot_be_used_are_counted_or_named(tmp_path: Path) -> None:
    stems = ["good", "no_mask", "mask_size", "mask_labels", "no_picture", "damaged", "colours"]
    folder = write_voc(tmp_path, stems)
    masks = folder / "SegmentationClass"
    (masks / "no_mask.png").unlink()
    Image.new("P", (SIZE[1], SIZE[0])).save(masks / "mask_size.png")
    save_mask(masks / "mask_labels.png", [21, 0])
    (folder / "JPEGImages/no_picture.jpg").unlink()
    (masks / "damaged.png").write_bytes((masks / "good.png").read_bytes()[:60])
    Image.new("RGB", SIZE).save(masks / "colours.png")
    dataset = load_dense(tmp_path)
    (picture,) = dataset
    assert picture.key.endswith("good.jpg")
    assert dataset.skipped == {"no_mask": 1, "mask_size": 1, "mask_labels": 1, "unreadable": 3}
    with pytest.raises(DataError, match=r"no_mask\.jpg: no .*no_mask\.png \(no_mask\)"):
        list(dataset.read(on_error="raise"))


def test_ranks_take_pictures_in_turn(tmp_path: Path) -> None:
    dataset = load_dense(write_coco(tmp_path, {f"{n}.jpg": [] for n in range(5)}))
    shares = [[row for row, _ in dataset.read((rank, 2))] for rank in range(2)]
    assert shares == [[0, 2, 4], [1, 3]]


def test_a_picture_of_another_size_than_its_annotations_is_left_out(tmp_path: Path) -> None:
    dataset = load_dense(write_coco(tmp_path, {"1.jpg": [], "2.jpg": []}))
    save_picture(tmp_path / "val2017/2.jpg", (5, 5))
    assert len(list(dataset)) == 1
    assert dataset.skipped == {"picture_size": 1}


# ---- measured ----------------------------------------------------------------------------------


class Told:
    """Says of every picture the mask that it was given."""

    def __init__(self, class_names: Sequence[str], mask: np.ndarray) -> None:
        self.class_names, self.mask = list(class_names), mask

    def labels_and_scores(
        self, picture: Image.Image, patch_size: int | None, shorter_side: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.mask, np.ones(self.mask.shape, np.float32)


def test_truth_is_perfect_and_what_is_unlabelled_does_not_count(tmp_path: Path) -> None:
    infos = [{"id": 9, "category_id": 3}, {"id": 4, "category_id": 90}]
    dataset = load_dense(write_panoptic(tmp_path / "coco", [9, 4, 0, 4], infos))
    told = np.array(columns(2, 3, 1, 3), np.uint8)[None].repeat(SIZE[1], 0)
    scores = evaluate_dense(Told(dataset.class_names, told), dataset, [16]).dense[16]
    assert (scores.miou, scores.pixel_accuracy, scores.pq) == (1, 1, 1)
    assert (scores.pq_things, scores.pq_stuff, scores.ap) == (1, 1, None)


@pytest.mark.parametrize(("write", "wanted"), [(write_ade20k, 1 / 2), (write_voc, 1.5 / 3)])
def test_background_is_measured_where_it_is_a_class(
    write: Callable[[Path], Path], wanted: float, tmp_path: Path
) -> None:
    """All is found but the class at the right, which is taken for background."""
    dataset = load_dense(write(tmp_path))
    (picture,) = dataset
    missed = picture.mask == picture.mask[0, -1]
    told = np.where(missed | (picture.mask == 255), 0, picture.mask)
    scores = evaluate_dense(Told(dataset.class_names, told), dataset, [16]).dense[16]
    assert scores.miou == pytest.approx(wanted)
    assert scores.pixel_accuracy == pytest.approx(1 - missed.sum() / (picture.mask != 255).sum())


def test_boxes_of_pictures_without_any_count_against_what_is_found(tmp_path: Path) -> None:
    box = {"category_id": 1, "bbox": [0, 0, 12, 8]}
    dataset = load_dense(write_coco(tmp_path, {"0.jpg": [], "1.jpg": [box]}))
    told = np.ones((SIZE[1], SIZE[0]), np.uint8)
    scores = evaluate_dense(Told(dataset.class_names, told), dataset, [16]).dense[16]
    assert (scores.ap, scores.miou, scores.pq) == (pytest.approx(0.5), None, None)
