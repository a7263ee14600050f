"""Intervals of paired differences."""

import numpy as np
from jaxtyping import Int, Shaped


def mean_interval(
    values: Shaped[np.ndarray, " n"], groups: Int[np.ndarray, " n"], draws: int = 10_000
) -> tuple[float, float]:
    """95% interval of the mean by a bootstrap: whole groups are drawn with replacement."""
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    drawn = np.random.default_rng(0).integers(0, len(counts), (draws, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
