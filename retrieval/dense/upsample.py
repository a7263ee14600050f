"""A map of patches at a picture's own resolution, a band of rows at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BAND = 1 << 20  # values at a time, some 4 MB


def upsampled(
    values: Float[np.ndarray, "r c k"], shape: tuple[int, int]
) -> Iterator[tuple[slice, Float[Tensor, "k h w"]]]:
    """(rows, their pixels' values) from the top, on the CPU; bilinear, half-pixel centres.

    As `torch.nn.functional.interpolate` has it, without holding `shape` x k values.
    """
    height, width = shape
    whole = torch.from_numpy(values)
    down, across = (
        _weights(old, new).to(whole.dtype) for old, new in zip(whole.shape[:2], shape, strict=True)
    )
    wide = whole.permute(2, 0, 1) @ across.T
    step = max(1, BAND // (width * values.shape[2]))
    for start in range(0, height, step):
        rows = slice(start, min(height, start + step))
        yield rows, down[rows] @ wide


def _weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Of each old value in each new one."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1 - (places[:, None] - torch.arange(old)).abs()).clamp_min(0)
