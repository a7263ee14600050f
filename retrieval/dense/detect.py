"""Zero-shot detection: a box around each connected region that is most like a text."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int32, UInt8
from scipy import ndimage

from contrastive.model.lit import LitModel
from data.class_names import DEFAULT_TEMPLATES
from data.dense.picture import Segments
from data.given import Images
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.segment import ZeroShotSegmenter, opened_images, shape_of

LEAST_AREA = 0.001  # of the picture; smaller regions are specks


class ZeroShotDetector:
    """Finds things by words, at any patch size.

    queries: as the class names of `ZeroShotSegmenter`, as are the other arguments. background: the
    least similarity (a cosine) of a region's pixels; also of each box's score.
    Raises `UsageError` as `ZeroShotSegmenter`.
    """

    def __init__(
        self,
        model: LitModel,
        queries: Sequence[str],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        background: float,
        value_path: bool = False,
        class_embeds: Float[np.ndarray, "c d"] | None = None,
    ) -> None:
        self.segmenter = ZeroShotSegmenter(
            model,
            queries,
            templates,
            background=background,
            value_path=value_path,
            class_embeds=class_embeds,
        )

    def predict(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[list[ScoredBox]]:
        """The boxes of each picture, best first, in its own pixels; label k is the k-th query.

        images, patch_size, shorter_side: as `ZeroShotSegmenter.similarities` takes them. A score is
        the mean cosine of the region's pixels. Two things of one query that touch by a side of a
        pixel, not by a corner alone, are one region, so one box.
        """
        found = []
        for image in opened_images(images):
            maps = self.segmenter.similarities(image, patch_size, shorter_side=shorter_side)[0]
            found.append(self.boxes(maps, shape_of(image)))
        return found

    def boxes(
        self, similarities: Float[np.ndarray, "r c k"], shape: tuple[int, int]
    ) -> list[ScoredBox]:
        """What `predict` makes of a map for a picture of `shape` = (height, width)."""
        labels, most = self.segmenter.best(similarities, shape)
        labels[most < (self.segmenter.background or 0.0)] = 0
        return boxes_of(labels, most)


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
