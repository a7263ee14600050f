"""Intervals of paired differences."""

import numpy as np
from jaxtyping import Int, Shaped

DRAWS = 10_000  # of the bootstrap


def mean_interval(
    values: Shaped[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """95% interval of the mean; whole groups are drawn with replacement."""
    _, groups = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    draws = np.random.default_rng(0).integers(0, len(counts), (DRAWS, len(counts)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
