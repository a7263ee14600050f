"""Mean intersection over union, from exact counts of pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer

from data.dense.picture import IGNORED
from data.errors import UsageError


@dataclass(frozen=True)
class MeanIoU:
    """How well masks agree."""

    mean: float
    """Over classes that are in a mask of either kind, background among them; in [0, 1]."""
    per_class: Float[np.ndarray, " k"]
    """Background first; nan where neither mask has the class."""
    pixel_accuracy: float


class IoUCounter:
    """Counts pixels by true and predicted label, over any number of pictures.

    Labels are 0 for background, then 1 to `num_classes`. Pixels whose true label is `ignored` count
    for nothing, whatever is predicted there. Counters of several ranks add up by their `counts`.
    """

    def __init__(self, num_classes: int, ignored: int | None = IGNORED) -> None:
        if num_classes < 1:
            raise UsageError(f"{num_classes} classes: at least 1")
        if ignored is not None and 0 <= ignored <= num_classes:
            raise UsageError(f"ignored {ignored}: is the label of a class, 0 to {num_classes}")
        self.num_classes, self.ignored = num_classes, ignored
        self.counts: Int[np.ndarray, "k k"] = np.zeros((num_classes + 1,) * 2, np.int64)
        """Pixels by true label (rows) and predicted label (columns)."""

    def add(self, true: Integer[np.ndarray, "h w"], predicted: Integer[np.ndarray, "i j"]) -> None:
        """Raises `UsageError` for masks of two sizes, and for labels outside the list."""
        if true.shape != predicted.shape:
            raise UsageError(
                f"a mask of {' x '.join(map(str, predicted.shape))} pixels for one of "
                f"{' x '.join(map(str, true.shape))}: they must be of one size"
            )
        counted = np.ones(true.shape, bool) if self.ignored is None else true != self.ignored
        side = self.num_classes + 1
        for what, labels in (("true", true[counted]), ("predicted", predicted[counted])):
            outside = labels[(labels < 0) | (labels >= side)]
            if outside.size:
                raise UsageError(
                    f"{what} label {outside[0]}: allowed are 0 to {self.num_classes}"
                    + f", and {self.ignored}, which is not counted" * (what == "true")
                )
        pairs = true[counted].astype(np.int64) * side + predicted[counted]
        self.counts += np.bincount(pairs, minlength=side**2).reshape(side, side)

    def result(self, classes: Sequence[int] | None = None) -> MeanIoU:
        """classes: the mean is taken over these labels alone; None: over all.

        Without any pixel every number is nan.
        """
        both = np.diag(self.counts)
        either = self.counts.sum(0) + self.counts.sum(1) - both
        per_class = np.full(len(both), np.nan)
        np.divide(both, either, out=per_class, where=either > 0)
        chosen = per_class if classes is None else per_class[list(classes)]
        seen = chosen[~np.isnan(chosen)]
        total = int(self.counts.sum())
        return MeanIoU(
            float(seen.mean()) if seen.size else float("nan"),
            per_class,
            float(both.sum() / total) if total else float("nan"),
        )
