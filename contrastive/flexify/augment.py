"""Random changes of images, the same for teacher and student.

A teacher that sees exactly what its student sees teaches best (Beyer et al., arXiv:2106.05237).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.flexify.config import AugmentConfig
from data.pipeline.labelled import Change


def build_change(cfg: AugmentConfig) -> Change | None:
    """What a loader does to each image, None for nothing."""
    if not cfg.randaugment:
        return None
    from torchvision.transforms import v2

    return v2.RandAugment(2, cfg.randaugment, interpolation=v2.InterpolationMode.BILINEAR)


def draw_mixup(alpha: float, num_images: int, seed: int, step: int) -> Float[Tensor, " b"]:
    """How much of itself each image of a global batch keeps; pairs of neighbours share a draw."""
    draws = np.random.default_rng([seed, step, 0x317]).beta(alpha, alpha, num_images // 2)
    return torch.from_numpy(np.repeat(draws, 2)).float()


def mix_pairs(values: Float[Tensor, "b ..."], own: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """Each row mixed with its neighbour's: row 0 with 1, 2 with 3, ...; b is even."""
    share = own.view(-1, *[1] * (values.ndim - 1))
    return values * share + swap_pairs(values) * (1 - share)


def swap_pairs(values: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, ..."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
