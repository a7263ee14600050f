"""Boxes by words, and their average precision."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_segment import NAMES, model, picture, segmenter  # noqa: F401

from data.dense.picture import PartLabels
from data.errors import UsageError
from retrieval import ZeroShotDetector
from retrieval.dense.average_precision import AveragePrecision, ScoredBox, TrueBox, iou


def random_boxes(seed: int):
    """Eight pictures of true boxes, crowds among them, and of found ones with tied scores."""
    rng = np.random.default_rng(seed)

    def box() -> tuple[int, ...]:
        return tuple(map(int, [*rng.integers(0, 60, 2), *rng.integers(5, 40, 2)]))

    for _ in range(8):
        true = [
            TrueBox(box(), int(rng.integers(1, 5)), bool(rng.random() < 0.15))
            for _ in range(rng.integers(0, 6))
        ]
        found = [
            ScoredBox(box(), int(rng.integers(1, 6)), round(float(rng.random()), 1))
            for _ in range(rng.integers(0, 6))
        ]
        for t in true:
            for _ in range(rng.integers(0, 3)):
                near = tuple(int(max(1, v + rng.integers(-4, 5))) for v in t.box)
                found.append(ScoredBox(near, t.label, round(float(rng.random()), 1)))
        yield true, found


PYCOCOTOOLS = {
    (0, 0.5): 0.1745668317,
    (0, 0.75): 0.0702970297,
    (1, 0.5): 0.5691890618,
    (1, 0.75): 0.1004832626,
    (2, 0.5): 0.5202145215,
    (2, 0.75): 0.399339934,
}
"""(seed, overlap) -> mean over classes of COCOeval's precision, of pycocotools 2.0."""


@pytest.mark.parametrize(("seed", "overlap"), PYCOCOTOOLS)
def test_average_precision_is_pycocotools(seed, overlap):
    measured = AveragePrecision(overlap)
    for true, found in random_boxes(seed):
        measured.add(true, found)
    assert measured.mean == pytest.approx(PYCOCOTOOLS[seed, overlap], abs=1e-9)


LVIS = {
    (0, 0.5): 0.1875589345,
    (0, 0.75): 0.1037128713,
    (1, 0.5): 0.5020970847,
    (1, 0.75): 0.1432893289,
    (2, 0.5): 0.5787953795,
    (2, 0.75): 0.4367161716,
}
"""The same of LVISEval's precision, of lvis 0.5."""


@pytest.mark.parametrize(("seed", "overlap"), LVIS)
def test_average_precision_of_what_is_labelled_in_part_is_that_of_lvis(seed, overlap):
    measured, fully = AveragePrecision(overlap), AveragePrecision(overlap)
    rng = np.random.default_rng(seed)
    pictures = list(random_boxes(seed))
    for crowded, found in pictures:
        true = [TrueBox(one.box, one.label) for one in crowded]
        here = {one.label for one in true}
        absent = frozenset(n for n in range(1, 6) if n not in here and rng.random() < 0.5)
        partly = PartLabels(absent, frozenset(n for n in here if rng.random() < 0.5))
        measured.add(true, found, partly=partly)
        fully.add(true, found)
    assert measured.mean == pytest.approx(LVIS[seed, overlap], abs=1e-9)
    assert measured.mean > fully.mean


def test_a_box_is_right_once_and_in_the_order_of_scores():
    true = [TrueBox((0, 0, 10, 10), 1), TrueBox((50, 50, 10, 10), 1)]
    right, wrong = ScoredBox((0, 0, 10, 9), 1, 0.5), ScoredBox((30, 0, 10, 10), 1, 0.9)
    measured = AveragePrecision()
    measured.add(true, [right])
    assert measured.mean == pytest.approx(51 / 101)  # recalls up to a half
    measured = AveragePrecision()
    measured.add(true, [wrong, right, ScoredBox((0, 0, 10, 8), 1, 0.4)])
    assert measured.mean == pytest.approx(0.5 * 51 / 101)
    measured.add([], [ScoredBox((0, 0, 5, 5), 2, 0.9)])
    assert set(measured.per_class()) == {1}  # the other class is nowhere true
    assert np.isnan(AveragePrecision().mean)
    assert iou((0, 0, 4, 4), (2, 2, 4, 4)) == 4 / 28
    assert iou((0, 0, 4, 4), (2, 2, 4, 4), crowd=True) == 4 / 16


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (0, 0, 5, -1), (0, float("nan"), 5, 5)])
def test_impossible_boxes_are_refused(box):
    for true, found in (([TrueBox(box, 1)], []), ([], [ScoredBox(box, 1, 0.5)])):
        with pytest.raises(UsageError, match="width and height above 0"):
            AveragePrecision().add(true, found)
    with pytest.raises(UsageError, match="no number"):
        AveragePrecision().add([], [ScoredBox((0, 0, 1, 1), 1, float("nan"))])
    with pytest.raises(UsageError, match="overlap 0"):
        AveragePrecision(0)


def test_boxes_are_around_what_the_queries_say(model, segmenter):  # noqa: F811
    embeds = segmenter.class_embeds.numpy()
    detector = ZeroShotDetector(model, NAMES, background=-1.0, value_path=True, class_embeds=embeds)
    found = detector.predict(picture(240, 240), 40)[0]
    scores = [box.score for box in found]
    assert scores == sorted(scores, reverse=True)
    best = {}
    for box in reversed(found):
        best[box.label] = box
    for label, left, top in ((1, 0, 0), (2, 120, 0), (3, 0, 120)):
        assert iou(best[label].box, (left, top, 120, 120)) > 0.5
    two = detector.predict([picture(240, 240), picture(60, 90)], 40)
    assert two[0] == found
    assert all(box.box[0] + box.box[2] <= 90 and box.box[1] + box.box[3] <= 60 for box in two[1])


def test_regions_that_do_not_touch_are_boxes_of_their_own_and_specks_are_none(model, segmenter):  # noqa: F811
    detector = ZeroShotDetector(model, NAMES, background=0.5)
    maps = np.zeros((8, 16, 3), np.float32)
    maps[1:4, 1:4, 0] = 0.9
    maps[4:7, 10:15, 0] = 0.7
    maps[1, 14, 1] = 0.55  # a speck at this resolution
    maps[6:, :2, 2] = 0.6
    boxes = detector.boxes(maps, (80, 160))
    assert [box.label for box in boxes] == [1, 1, 3]
    assert iou(boxes[0].box, (10, 10, 30, 30)) > 0.5
    assert iou(boxes[1].box, (100, 40, 50, 30)) > 0.5
    assert all(0.5 < box.score <= most for box, most in zip(boxes, (0.9, 0.7, 0.6), strict=True))
    assert len(detector.boxes(maps, (800, 1600))) == len(boxes)
    assert detector.boxes(np.zeros((4, 4, 3), np.float32), (40, 40)) == []


def test_a_picture_of_a_thing_finds_it(model, segmenter):  # noqa: F811
    pictures = [Image.new("RGB", (240, 240), "red"), np.full((64, 90, 3), (0, 255, 0), np.uint8)]
    detector = ZeroShotDetector(model, pictures, background=-1.0, value_path=True)
    assert detector.segmenter.class_names == ["picture 1", "picture 2"]
    own = model.encode_patches(pictures[0], 8)[0].flatten(0, 1)
    assert (own @ detector.segmenter.class_embeds[0]).max() > 0.99
    (similarities,) = detector.segmenter.similarities(picture(240, 240), 40)
    for label, left in ((0, True), (1, False)):
        down, across = np.unravel_index(similarities[..., label].argmax(), (6, 6))
        assert (down < 3, across < 3) == (True, left)
    windows = ZeroShotDetector(model, pictures, background=-1.0, windows=(2,))
    assert [box.label for box in windows.predict(pictures[0], 40)[0]] == [1]
    with pytest.raises(UsageError, match="cannot be read"):
        ZeroShotDetector(model, [Path("no-such-file.png")], background=0.0)
    with pytest.raises(UsageError, match="1 texts and 2 pictures"):
        ZeroShotDetector(model, [*pictures, "rain"], background=0.0)
