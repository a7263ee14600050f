"""How well masks, boxes and segments are found in a data set, at several patch sizes."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from contrastive.distributed import barrier, gather_objects, is_main, rank, world_size
from data.config import OnError
from data.dense.dense_dataset import DenseDataset
from data.dense.picture import AnnotatedPicture
from data.errors import UsageError
from data.pipeline.prefetch import prefetched
from data.progress import Progress
from retrieval.dense.average_precision import AveragePrecision, ScoredBox
from retrieval.dense.connected import boxes_of, segments_of
from retrieval.dense.miou import IoUCounter
from retrieval.dense.panoptic_quality import PanopticQuality
from retrieval.evaluation.results import DatasetResult, DenseScores

OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # of COCO's AP; AP50 is the first


@runtime_checkable
class Segmenter(Protocol):
    """Says of each pixel which class it is of: `ZeroShotSegmenter`, and what is trained for it."""

    class_names: list[str]

    def labels_and_scores(
        self, picture: Image.Image, patch_size: int | None, shorter_side: int | None = None
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """A mask at the picture's own resolution, and how sure it is of each pixel."""


@runtime_checkable
class Detector(Protocol):
    """Finds boxes without a mask: `TrainedDetector`."""

    class_names: list[str]

    def boxes_in(
        self, picture: Image.Image, patch_size: int | None, shorter_side: int | None = None
    ) -> list[ScoredBox]:
        """In the picture's own pixels; label k is the k-th class name."""


def evaluate_dense(
    segmenter: Segmenter | Detector,
    dataset: DenseDataset,
    patch_sizes: Sequence[int],
    *,
    shorter_side: int | None = None,
    on_error: OnError = "skip",
) -> DatasetResult:
    """Mean IoU where pictures have masks, AP where they have boxes, PQ where they have segments.

    Ranks take pictures in turn; each returns the result of all, equal to one process's. Boxes are
    around connected regions of the mask, scored by their mean; segments are these, and of stuff all
    of it. shorter_side: as the segmenter takes it. Of a detector only AP is measured.
    Raises `UsageError` where the class names differ, or no picture could be used.
    """
    if list(segmenter.class_names) != list(dataset.class_names):
        raise UsageError(f"the segmenter's class names are not those of {dataset.name}")
    sizes = tuple(dict.fromkeys(patch_sizes))
    if not sizes:
        raise UsageError("no patch size to evaluate at")
    collectors = {size: DenseCollector(dataset) for size in sizes}
    share = rank(), world_size()
    number = 0
    with Progress(
        desc=f"evaluating {dataset.name}",
        unit="img",
        total=len(range(share[0], len(dataset), share[1])),
        disable=not is_main(),
    ) as bar:
        for row, picture in prefetched(dataset.read(share, on_error)):
            for size, collector in collectors.items():
                if isinstance(segmenter, Detector):
                    boxes = segmenter.boxes_in(picture.image, size, shorter_side)
                    collector.add_boxes(row, picture, boxes)
                    continue
                found = segmenter.labels_and_scores(picture.image, size, shorter_side)
                collector.add(row, picture, *found)
            number += 1
            bar.update(1)
    barrier(patient=True)
    number = sum(gather_objects(number))
    skipped = dict(sum(map(Counter, gather_objects(dataset.skipped)), Counter[str]()))
    if not number:
        raise UsageError(f"{dataset.name}: no picture could be used ({skipped})")
    return DatasetResult(
        name=dataset.name,
        num_images=number,
        num_classes=len(dataset.class_names),
        errors=skipped,
        dense={size: collector.of_all_ranks() for size, collector in collectors.items()},
        noted=dict(dataset.noted),
    )


class DenseCollector:
    """Counts of one patch size, of all that the pictures have."""

    def __init__(self, dataset: DenseDataset) -> None:
        self.dataset = dataset
        num_classes = len(dataset.class_names)
        self.iou = IoUCounter(num_classes)
        self.precision = [AveragePrecision(overlap) for overlap in OVERLAPS]
        self.quality = PanopticQuality(num_classes)
        self.has: Counter[str] = Counter()
        """Pictures with masks, boxes, segments."""

    def add(
        self,
        row: int,
        picture: AnnotatedPicture,
        labels: UInt8[np.ndarray, "h w"],
        scores: Float[np.ndarray, "h w"],
    ) -> None:
        """One picture, its number in the set, and what was found in it."""
        if picture.mask is not None:
            self.iou.add(picture.mask, labels)
            self.has["mask"] += 1
        if picture.boxes is not None:
            self.add_boxes(row, picture, boxes_of(labels, scores))
        if picture.segments is not None:
            self.quality.add(picture.segments, segments_of(labels, self.dataset.stuff))
            self.has["segments"] += 1

    def add_boxes(self, row: int, picture: AnnotatedPicture, boxes: Sequence[ScoredBox]) -> None:
        """`add`, of what was found as boxes."""
        if picture.boxes is None:
            return
        for precision in self.precision:
            precision.add(picture.boxes, boxes, row, picture.partly)
        self.has["boxes"] += 1

    def of_all_ranks(self) -> DenseScores:
        """The same on all ranks, which call it together."""
        own = (self.iou, self.precision, self.quality, self.has)
        (iou, precisions, quality, has), *others = gather_objects(own)
        for more_iou, more_precisions, more_quality, more in others:
            iou.counts += more_iou.counts
            for precision, other in zip(precisions, more_precisions, strict=True):
                precision.merge(other)
            quality.merge(more_quality)
            has += more
        values: dict[str, float | None] = {}
        if has["mask"]:
            classes = None if self.dataset.background else range(1, iou.num_classes + 1)
            found = iou.result(classes)
            values |= {"miou": found.mean, "pixel_accuracy": found.pixel_accuracy}
        if has["boxes"]:
            means = [precision.mean for precision in precisions]
            values |= {"ap": float(np.mean(means)), "ap50": means[0]}
        if has["segments"]:
            all_ = quality.result()
            values |= {"pq": all_.pq, "sq": all_.sq, "rq": all_.rq}
            stuff = self.dataset.stuff
            if stuff:
                things = set(range(1, quality.num_classes + 1)) - stuff
                values |= {
                    "pq_things": quality.result(things).pq,
                    "pq_stuff": quality.result(stuff).pq,
                }
        per_class = tuple(found.per_class.tolist()) if has["mask"] else ()
        return DenseScores(iou_per_class=per_class, **values)
