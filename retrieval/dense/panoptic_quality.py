"""Panoptic quality (arXiv:1801.00868): how well a picture is parted into things and stuff."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from data.dense.picture import BACKGROUND, Segments
from data.errors import UsageError

VOID = 0  # an id: of no segment
MATCHED, ALONE, MISSED = range(3)


@dataclass(frozen=True)
class Quality:
    """Means over classes that are true or found somewhere, in [0, 1]; nan without any."""

    pq: float
    """sq x rq of each class."""
    sq: float
    """Segmentation quality: the mean IoU of matched segments; of a class without any, 0."""
    rq: float
    """Recognition quality: matched over matched and half of what is left on either side."""


class PanopticQuality:
    """Collects segments of pictures. Two of one class match where their IoU is above a half.

    Pixels that are of no true segment count for nothing; a found segment that is in these, or in
    crowds of its class, by more than a half, is not wrong; nobody needs to find a crowd. As
    panopticapi has it, of several crowds of one class in a picture all count. Those of several
    ranks are merged, and are then equal to one of all pictures.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError(f"{num_classes} classes: at least 1")
        self.num_classes = num_classes
        self.counts: Int[np.ndarray, "k 3"] = np.zeros((num_classes + 1, 3), np.int64)
        """Of each label: matched pairs, found ones alone, missed true ones."""
        self.overlaps: list[list[float]] = [[] for _ in range(num_classes + 1)]
        """Of each label: the IoU of each pair."""

    def add(self, true: Segments, found: Segments) -> None:
        """One picture. Raises `UsageError` for two sizes, and segments without a known label."""
        if true.ids.shape != found.ids.shape:
            raise UsageError(f"segments of {found.ids.shape} for those of {true.ids.shape} pixels")
        for segments in (true, found):
            outside = [k for k in segments.labels.values() if not 0 <= k <= self.num_classes]
            if outside:
                raise UsageError(f"label {outside[0]}: allowed are 0 to {self.num_classes}")
        codes = true.ids.astype(np.int64) << 32 | found.ids
        pairs, areas = np.unique(codes, return_counts=True)
        both = {
            (code >> 32, code & 0xFFFFFFFF): area
            for code, area in zip(pairs.tolist(), areas.tolist(), strict=True)
        }
        self._judge(_Overlaps(both, true, found))

    def _judge(self, here: "_Overlaps") -> None:
        true, found, matched = here.true, here.found, set()
        for (t, f), both in here.both.items():
            label = found.labels.get(f, BACKGROUND)
            if true.labels.get(t, BACKGROUND) != label or not label or t in true.crowds:
                continue
            either = here.area_true[t] + here.area_found[f] - both - here.both.get((VOID, f), 0)
            if 2 * both > either:
                self.counts[label, MATCHED] += 1
                self.overlaps[label].append(both / either)
                matched |= {("true", t), ("found", f)}
        for t in here.area_true:
            label = true.labels.get(t, BACKGROUND)
            if label and t not in true.crowds and ("true", t) not in matched:
                self.counts[label, MISSED] += 1
        for f, area in here.area_found.items():
            label = found.labels.get(f, BACKGROUND)
            if label and ("found", f) not in matched and 2 * here.excused(f, label) <= area:
                self.counts[label, ALONE] += 1

    def merge(self, other: "PanopticQuality") -> None:
        """Add what another collected of other pictures."""
        self.counts += other.counts
        for own, more in zip(self.overlaps, other.overlaps, strict=True):
            own.extend(more)

    def per_class(self) -> Float[np.ndarray, "k 3"]:
        """PQ, SQ and RQ of each class, the first label first; nan where it is nowhere."""
        found = np.full((self.num_classes, 3), np.nan)
        for label in range(1, self.num_classes + 1):
            matched, alone, missed = self.counts[label].tolist()
            if matched + alone + missed:
                total = math.fsum(self.overlaps[label])  # exact, so in any order
                sq = total / matched if matched else 0.0
                weight = matched + alone / 2 + missed / 2
                found[label - 1] = total / weight, sq, matched / weight
        return found

    def result(self, labels: Collection[int] | None = None) -> Quality:
        """labels: the means are over these alone, as over things or stuff; None: over all."""
        rows = self.per_class()
        chosen = rows if labels is None else rows[[label - 1 for label in sorted(labels)]]
        seen = chosen[~np.isnan(chosen[:, 0])]
        return Quality(*(_means(seen) if len(seen) else [math.nan] * 3))


def _means(rows: Float[np.ndarray, "n 3"]) -> Sequence[float]:
    return [float(mean) for mean in rows.mean(axis=0)]


class _Overlaps:
    """Pixels by true and found segment."""

    def __init__(self, both: dict[tuple[int, int], int], true: Segments, found: Segments) -> None:
        self.both, self.true, self.found = both, true, found
        self.area_true: dict[int, int] = {}
        self.area_found: dict[int, int] = {}
        for (t, f), count in both.items():
            self.area_true[t] = self.area_true.get(t, 0) + count
            self.area_found[f] = self.area_found.get(f, 0) + count
        for segments, areas in ((true, self.area_true), (found, self.area_found)):
            unknown = areas.keys() - segments.labels.keys() - {VOID}
            if unknown:
                raise UsageError(f"segment {min(unknown)} has no label")

    def excused(self, f: int, label: int) -> int:
        """Its pixels that are of no true segment, or of crowds of its class."""
        crowds = [t for t in self.true.crowds if self.true.labels[t] == label]
        return sum(self.both.get((t, f), 0) for t in [VOID, *crowds])
