"""Average precision of boxes, as COCO measures it (AP50 and at other overlaps)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from data.dense.picture import Box, Number, PartLabels, TrueBox
from data.errors import UsageError

MOST_BOXES = 100  # of one class in one picture, the best scores
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ScoredBox:
    box: Box
    label: int
    score: float


@dataclass
class AveragePrecision:
    """Collects boxes of pictures; a box is right where it overlaps a true one by `overlap` (IoU).

    The best scores choose first, each true box is found once. Equal to pycocotools over all areas.
    Those of several ranks are merged, and are then equal to one of all pictures.
    """

    overlap: Number = 0.5
    _scores: dict[int, list[tuple[float, int, bool]]] = field(default_factory=dict)
    """Of each label: score, number of the picture, whether it is right."""
    _true: dict[int, int] = field(default_factory=dict)
    _added: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise UsageError(f"overlap {self.overlap}: above 0, at most 1")

    def add(
        self,
        true: Sequence[TrueBox],
        found: Sequence[ScoredBox],
        picture: int | None = None,
        partly: PartLabels | None = None,
    ) -> None:
        """One picture. picture: its number among all, by which equal scores are ordered; None: as
        many as were added before. partly: what is known where not all is. What is found of a class
        of which nothing is known does not count, nor what is wrong of an incomplete one, as in
        LVIS's own evaluation.

        Raises `UsageError` for boxes without width or height, and unreal scores.
        """
        number = self._added if picture is None else picture
        self._added += 1
        for box in [t.box for t in true] + [f.box for f in found]:
            if not (np.isfinite(box).all() and box[2] > 0 and box[3] > 0):
                raise UsageError(f"box {box}: left, top, and a width and height above 0")
        if not all(np.isfinite(one.score) for one in found):
            raise UsageError("a box's score is no number")
        present = {t.label for t in true}
        known = present | (partly.absent if partly else {f.label for f in found})
        incomplete = partly.incomplete if partly else frozenset()
        for label in known & (present | {f.label for f in found}):
            here = sorted((t for t in true if t.label == label), key=lambda t: t.crowd)
            best = sorted((f for f in found if f.label == label), key=lambda f: -f.score)
            best = best[:MOST_BOXES]
            self._true[label] = self._true.get(label, 0) + sum(not t.crowd for t in here)
            judged = self._scores.setdefault(label, [])
            taken = np.zeros(len(here), bool)
            for one in best:
                right = self._match(one, here, taken)
                if right or (right is False and label not in incomplete):
                    judged.append((one.score, number, right))

    def _match(
        self, one: ScoredBox, here: Sequence[TrueBox], taken: Bool[np.ndarray, " n"]
    ) -> bool | None:
        """Whether it is right; None where it falls into a crowd. Takes the true box."""
        best, least = -1, min(self.overlap, 1 - 1e-10)
        for number, true in enumerate(here):
            if taken[number] and not true.crowd:
                continue
            if best >= 0 and true.crowd and not here[best].crowd:
                break  # true things come first
            overlap = iou(one.box, true.box, true.crowd)
            if overlap >= least:
                best, least = number, overlap
        if best < 0:
            return False
        taken[best] = True
        return None if here[best].crowd else True

    def merge(self, other: "AveragePrecision") -> None:
        """Add what another collected of other pictures, which have their numbers."""
        for label, judged in other._scores.items():
            self._scores.setdefault(label, []).extend(judged)
        for label, count in other._true.items():
            self._true[label] = self._true.get(label, 0) + count
        self._added += other._added

    def per_class(self) -> dict[int, float]:
        """Of each label that is true somewhere."""
        return {
            label: _average_precision(self._scores.get(label, []), total)
            for label, total in sorted(self._true.items())
            if total
        }

    @property
    def mean(self) -> float:
        """Over the labels that are true somewhere; nan without any."""
        values = list(self.per_class().values())
        return float(np.mean(values)) if values else float("nan")


def iou(one: Box, other: Box, crowd: bool = False) -> float:
    """Intersection over union; of a crowd, over the first box."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    area = one[2] * one[3]
    return both / area if crowd else both / (area + other[2] * other[3] - both)


def _average_precision(judged: Sequence[tuple[float, int, bool]], total: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or above."""
    order = sorted(judged, key=lambda one: (-one[0], one[1]))  # stable within a picture
    right = np.array([hit for _, _, hit in order], bool)
    hits = np.cumsum(right)
    precision: Float[np.ndarray, " n"] = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / total, RECALLS)
    return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())
