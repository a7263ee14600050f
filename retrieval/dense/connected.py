"""A mask as boxes, and as segments: what is around, and in, its connected regions."""

from collections.abc import Collection, Iterator

import numpy as np
from jaxtyping import Float, Int32, UInt8
from scipy import ndimage

from data.dense.picture import Segments
from retrieval.dense.average_precision import ScoredBox

LEAST_AREA = 0.001  # of the picture; smaller regions are specks


def boxes_of(labels: UInt8[np.ndarray, "h w"], most: Float[np.ndarray, "h w"]) -> list[ScoredBox]:
    """A box around each region of a mask but for specks, best first.

    most: how sure each pixel is of its label; a box's score is the mean of its region.
    """
    boxes = []
    for label, regions, numbers in _regions(labels):
        scores = ndimage.mean(most, regions, numbers)
        places = ndimage.find_objects(regions)
        for number, score in zip(numbers, scores, strict=True):
            rows, columns = places[number - 1]
            size = (columns.stop - columns.start, rows.stop - rows.start)
            boxes.append(ScoredBox((columns.start, rows.start, *size), label, float(score)))
    return sorted(boxes, key=lambda box: -box.score)


def segments_of(labels: UInt8[np.ndarray, "h w"], stuff: Collection[int] = ()) -> Segments:
    """A mask as segments: each region of a thing but for specks, and of stuff all of it."""
    ids = np.zeros(labels.shape, np.int32)
    label_of: dict[int, int] = {}
    for label in stuff:
        if (labels == label).any():
            label_of[len(label_of) + 1] = label
            ids[labels == label] = len(label_of)
    for label, regions, numbers in _regions(labels):
        if label not in stuff:
            for number in numbers:
                label_of[len(label_of) + 1] = label
                ids[regions == number] = len(label_of)
    return Segments(ids, label_of)


def _regions(
    labels: UInt8[np.ndarray, "h w"],
) -> Iterator[tuple[int, Int32[np.ndarray, "h w"], list[int]]]:
    """(label, the region's number of each of its pixels, the numbers of those that are large)."""
    for label in np.unique(labels[labels > 0]).tolist():
        regions, count = ndimage.label(labels == label)
        areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
        large = np.flatnonzero(areas >= LEAST_AREA * labels.size) + 1
        if len(large):
            yield label, regions, large.tolist()
