"""Fewer tokens at any patch size: a share of each image's patches is read, the rest is dropped."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.vision.config import PatchDropoutConfig
from data.pipeline.order import permutation


def keep_share(cfg: PatchDropoutConfig, step: int, steps: int) -> float:
    """The share of the patches that step `step` of `steps` reads; steps count from 0."""
    if cfg.schedule == "constant":
        return cfg.keep_rate
    if cfg.schedule == "linear":
        way = step / max(1, steps - 1)
    else:
        way = 1 - abs(1 - 2 * (step % cfg.cycle_steps) / cfg.cycle_steps)
    return cfg.keep_rate + (cfg.keep_rate_end - cfg.keep_rate) * way


def num_kept(share: float, num_patches: int) -> int:
    return max(1, round(share * num_patches))


def draw_kept(
    share: float, num_patches: int, num_images: int, seed: int, step: int
) -> Int[Tensor, "b k"]:
    """Which patches each image of a global batch keeps, in order: a function of (seed, step)."""
    bits = np.random.PCG64([seed, step, 0x70CE5]).random_raw(num_images * num_patches)
    order = np.argsort(bits.reshape(num_images, num_patches), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, : num_kept(share, num_patches)], axis=1))


def keep_patches(
    tokens: Float[Tensor, "b n d"], keep: float | Int[Tensor, "b k"]
) -> Float[Tensor, "b k d"]:
    """The patches numbered in `keep`; a share keeps the same scattered ones of every image, so
    that an image's embedding depends on nothing else."""
    if not isinstance(keep, Tensor):
        chosen = permutation(tokens.shape[1], 0)[: num_kept(keep, tokens.shape[1])]
        return tokens[:, torch.from_numpy(np.sort(chosen)).to(tokens.device)]
    return tokens.gather(1, keep.to(tokens.device)[:, :, None].expand(-1, -1, tokens.shape[2]))
