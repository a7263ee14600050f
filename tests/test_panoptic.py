"""Panoptic quality of segments, and average precision, of parts of a data set."""

import numpy as np
import pytest
from test_detect import PYCOCOTOOLS, random_boxes

from data.dense.picture import Segments
from data.errors import UsageError
from retrieval.dense.average_precision import AveragePrecision
from retrieval.dense.connected import segments_of
from retrieval.dense.panoptic_quality import PanopticQuality

NUM_CLASSES = 4


def segments(rows: list[list[int]], labels: dict[int, int], crowds: set[int] = frozenset()):
    return Segments(np.array(rows, np.int32), labels, frozenset(crowds))


def random_segments(rng: np.random.Generator, side: int = 24) -> tuple[Segments, Segments]:
    """Rectangles over each other, some of no segment; the found ones are moved a little."""
    ids = np.zeros((2, side, side), np.int32)
    labels: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for number in range(1, 9):
        top, left = rng.integers(0, side - 6, 2)
        height, width = rng.integers(4, 12, 2)
        label = int(rng.integers(1, NUM_CLASSES + 1))
        for which, moved in enumerate(((0, 0), rng.integers(-1, 2, 2))):
            y, x = max(0, top + moved[0]), max(0, left + moved[1])
            ids[which, y : y + height, x : x + width] = number
            wrong = which and rng.random() < 0.2
            labels[which][number] = label % NUM_CLASSES + 1 if wrong else label
    crowds = frozenset(n for n in range(1, 9) if rng.random() < 0.15)
    return Segments(ids[0], labels[0], crowds), Segments(ids[1], labels[1])


def by_definition(pairs: list[tuple[Segments, Segments]], label: int) -> tuple[float, ...] | None:
    """PQ, SQ and RQ from sets of pixels."""
    matched, alone, missed = [], 0, 0
    for true, found in pairs:
        pixels = [
            {n: set(np.flatnonzero(one.ids == n).tolist()) for n, k in one.labels.items()
             if k == label and (one.ids == n).any()}
            for one in (true, found)
        ]  # fmt: skip
        crowd = set().union(*(p for n, p in pixels[0].items() if n in true.crowds))
        wanted = {n: p for n, p in pixels[0].items() if n not in true.crowds}
        void = set(np.flatnonzero(true.ids == 0).tolist())
        right = set()
        for n, own in wanted.items():
            for m, other in pixels[1].items():
                iou = len(own & other) / len((own | other) - (void - own))
                if iou > 0.5:
                    matched.append(iou)
                    right |= {("true", n), ("found", m)}
        missed += sum(("true", n) not in right for n in wanted)
        alone += sum(
            ("found", m) not in right and len(own & (void | crowd)) / len(own) <= 0.5
            for m, own in pixels[1].items()
        )
    if not matched and not alone and not missed:
        return None
    weight = len(matched) + alone / 2 + missed / 2
    sq = sum(matched) / len(matched) if matched else 0.0
    return sum(matched) / weight, sq, len(matched) / weight


def test_quality_is_what_sets_of_pixels_say() -> None:
    rng = np.random.default_rng(0)
    pairs = [random_segments(rng) for _ in range(12)]
    measured = PanopticQuality(NUM_CLASSES)
    for true, found in pairs:
        measured.add(true, found)
    rows = measured.per_class()
    for label in range(1, NUM_CLASSES + 1):
        wanted = by_definition(pairs, label)
        assert wanted is not None
        assert 0 < wanted[0] < 1
        assert rows[label - 1] == pytest.approx(wanted, abs=1e-12)
    assert measured.counts[1:].min() > 0  # matches, wrong and missed ones of every class
    result = measured.result()
    assert (result.pq, result.sq, result.rq) == pytest.approx(tuple(rows.mean(0)))
    assert measured.result([1, 3]).pq == pytest.approx(rows[[0, 2], 0].mean())


TORCHMETRICS = {
    0: (0.43695007, 0.73172169, 0.59844387),
    1: (0.40768477, 0.74094180, 0.55213499),
    2: (0.45880495, 0.75380354, 0.60878003),
}
"""seed -> PQ, SQ and RQ of PanopticQuality of torchmetrics 1.9.0."""


@pytest.mark.parametrize("seed", TORCHMETRICS)
def test_quality_is_torchmetrics(seed: int) -> None:
    """Where every pixel is found to be of some segment, as they disagree with the paper where it is
    not, and without crowds, which they do not have."""
    rng = np.random.default_rng(seed)
    measured = PanopticQuality(NUM_CLASSES + 1)
    for _ in range(12):
        true, found = random_segments(rng)
        ids, labels = np.where(found.ids == 0, 9, found.ids), {**found.labels, 9: NUM_CLASSES + 1}
        measured.add(Segments(true.ids, true.labels), Segments(ids, labels))
    result = measured.result()
    assert (result.pq, result.sq, result.rq) == pytest.approx(TORCHMETRICS[seed], abs=1e-7)


def test_what_is_unlabelled_or_a_crowd_excuses_and_the_ground_does_not() -> None:
    found = segments([[1, 1, 1, 2, 2, 2]], {1: 1, 2: 2})
    cases = [
        (segments([[5, 5, 0, 6, 0, 0]], {5: 1, 6: 2}), (1, 0, 0), (1, 0, 0)),
        (segments([[5, 0, 0, 0, 0, 6]], {5: 2, 6: 1}), (0, 0, 1), (0, 0, 1)),
        (segments([[5, 5, 5, 5, 5, 5]], {5: 1}, {5}), (0, 0, 0), (0, 1, 0)),
        (segments([[5, 5, 5, 5, 5, 5]], {5: 0}), (0, 1, 0), (0, 1, 0)),
    ]
    for true, first, second in cases:
        measured = PanopticQuality(2)
        measured.add(true, found)
        assert tuple(map(tuple, measured.counts[1:].tolist())) == (first, second)
    empty = PanopticQuality(2)
    assert np.isnan(empty.result().pq)


def test_segments_without_a_known_label_are_refused() -> None:
    good = segments([[1, 0]], {1: 1})
    for bad, says in (
        (segments([[1, 2]], {1: 1}), "segment 2 has no label"),
        (segments([[1, 0]], {1: 3}), "label 3: allowed are 0 to 2"),
        (segments([[1], [0]], {1: 1}), r"\(2, 1\)|\(1, 2\)"),
    ):
        for pair in ((bad, good), (good, bad)):
            measured = PanopticQuality(2)
            with pytest.raises(UsageError, match=says):
                measured.add(*pair)
            assert not measured.counts.any()


def test_a_mask_becomes_regions_of_things_and_one_segment_of_stuff() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:10, :10] = mask[20:30, 20:30] = 1
    mask[:10, 30:] = mask[30:, :10] = 2
    mask[15, 15] = 1  # a speck
    found = segments_of(mask, {2})
    assert sorted(found.labels.values()) == [1, 1, 2]
    of_pixels = np.vectorize(lambda n: found.labels.get(n, 0))(found.ids)
    mask[15, 15] = 0
    assert np.array_equal(of_pixels, mask)


def test_parts_that_are_merged_measure_as_one() -> None:
    rng = np.random.default_rng(3)
    pairs = [random_segments(rng) for _ in range(7)]
    whole, parts = PanopticQuality(NUM_CLASSES), [PanopticQuality(NUM_CLASSES) for _ in range(3)]
    for number, pair in enumerate(pairs):
        whole.add(*pair)
        parts[number % 3].add(*pair)
    for other in parts[1:]:
        parts[0].merge(other)
    assert parts[0].result() == whole.result()
    assert np.array_equal(parts[0].per_class(), whole.per_class(), equal_nan=True)


def test_equal_scores_of_two_ranks_are_ordered_by_picture() -> None:
    for seed, overlap in PYCOCOTOOLS:  # scores of one decimal, many of them equal
        whole, parts = AveragePrecision(overlap), [AveragePrecision(overlap) for _ in range(2)]
        for number, (true, found) in enumerate(random_boxes(seed)):
            whole.add(true, found)
            parts[number % 2].add(true, found, number)
        parts[1].merge(parts[0])
        assert parts[1].per_class() == whole.per_class()
