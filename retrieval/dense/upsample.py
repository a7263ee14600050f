"""A map of patches at a picture's own resolution, a band of rows at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

BAND = 1 << 22  # values at a time, some 16 MB


def upsampled(
    values: Float[np.ndarray, "r c k"], shape: tuple[int, int]
) -> Iterator[tuple[slice, Float[np.ndarray, "h w k"]]]:
    """(rows, their pixels' values) from the top; bilinear, half-pixel centres.

    As `torch.nn.functional.interpolate` has it, without holding `shape` x k values.
    """
    height, width = shape
    down, across = (
        _weights(old, new).astype(values.dtype)
        for old, new in zip(values.shape[:2], shape, strict=True)
    )
    step = max(1, BAND // (width * values.shape[2]))
    for start in range(0, height, step):
        rows = slice(start, min(height, start + step))
        band = np.tensordot(down[rows], values, 1)
        yield rows, np.matmul(across, band)


def _weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Of each old value in each new one."""
    places = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    return (1 - np.abs(places[:, None] - np.arange(old))).clip(0)
