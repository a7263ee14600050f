"""Maps of overlapping windows of a picture, each read as a picture of its own.

Texts are trained against whole pictures, and a window is one, where the token of a patch is none;
so it was done with CLIP (CLIP-DIY, arXiv:2309.14289). At a coarse patch size dozens of windows cost
what the whole costs at a fine one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.regions.boxes import overlapping_windows
from retrieval.regions.parts import part_of, reads_whole, smaller

CELLS = 32  # of a map, a side
FALL = 2.0  # a window counts exp(-2) as much at its edges as in its middle
_TOGETHER = 32  # windows of one forward


@torch.no_grad()
def map_of_windows(
    model: LitModel,
    class_embeds: Float[Tensor, "k d"],
    image: Image.Image | Tensor,
    patch_size: int,
    windows: Sequence[int],
) -> Float[np.ndarray, "r c k"]:
    """The cosine of each cell and each class: the mean of its windows, the nearer the more.

    windows: for each size, how many there are a side; they overlap by half, so that 3 are half as
    wide as the picture. Raises `UsageError` for pixels that are already normalised.
    """
    if isinstance(image, Tensor):
        raise UsageError("pixels that are already normalised cannot be cut into windows")
    whole = reads_whole(model)
    picture = smaller(whole, image)
    boxes = [box for each in windows for box in overlapping_windows(each)]
    parts = [part_of(picture, box) for box in boxes]
    embeds = torch.cat(
        [
            whole.encode_image(parts[start : start + _TOGETHER], patch_size)
            for start in range(0, len(parts), _TOGETHER)
        ]
    )
    cosines = embeds.to(class_embeds.dtype) @ class_embeds.T
    sums = cosines.new_zeros(CELLS, CELLS, cosines.shape[1])
    total = cosines.new_zeros(CELLS, CELLS, 1)
    for each, found in zip(windows, cosines.split([n * n for n in windows]), strict=True):
        near = _nearness(each).to(cosines)
        sums += torch.einsum("yi,xj,ijk->yxk", near, near, found.unflatten(0, (each, each)))
        total += torch.outer(near.sum(1), near.sum(1))[..., None]
    return (sums / total).cpu().numpy()


def _nearness(windows: int) -> Float[Tensor, "cells n"]:
    """How much each of the windows of a side counts for each cell, 0 outside."""
    spans = [(box.left, box.right) for box in overlapping_windows(windows)[:windows]]
    left, right = torch.tensor(spans, dtype=torch.float64).T
    places = (torch.arange(CELLS, dtype=torch.float64) + 0.5)[:, None] / CELLS
    away = (places - (left + right) / 2) / ((right - left) / 2)
    return torch.where(away.abs() <= 1, (-FALL * away.square()).exp(), 0)
