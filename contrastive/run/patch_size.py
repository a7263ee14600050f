"""The patch size that a training step draws."""

from collections.abc import Sequence

import numpy as np


def draw_patch_size(
    patch_sizes: Sequence[int], weights: Sequence[float], seed: int, step: int
) -> int:
    """The patch size of a step: the same on all ranks, a pure function of (seed, step).

    weights: relative, one per size; empty: all equal.
    """
    shares = np.asarray(weights or [1.0] * len(patch_sizes), dtype=float)
    position = np.random.PCG64([seed, step, 0x9A7C4]).random_raw() / 2.0**64
    return int(patch_sizes[int((shares.cumsum() / shares.sum() <= position).sum())])
