"""Patch dropout: a random share of each image's patches, the keep rate, is read."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.vision.config import PatchDropoutConfig
from data.pipeline.order import permutation


def keep_rate_at(cfg: PatchDropoutConfig, step: int, steps: int) -> float:
    """The keep rate of step `step` of `steps`; steps count from 0."""
    if cfg.schedule == "constant":
        return cfg.keep_rate
    if cfg.schedule == "linear":
        progress = step / max(1, steps - 1)
    else:
        progress = 1 - abs(1 - 2 * (step % cfg.cycle_steps) / cfg.cycle_steps)
    return cfg.keep_rate + (cfg.keep_rate_end - cfg.keep_rate) * progress


def num_kept(keep_rate: float, num_patches: int) -> int:
    return max(1, round(keep_rate * num_patches))


def draw_kept(
    keep_rate: float, num_patches: int, num_images: int, seed: int, step: int
) -> Int[Tensor, "b k"]:
    """Numbers of the patches that each image of a global batch keeps, ascending: a function of
    (seed, step), drawn for each image anew."""
    bits = np.random.PCG64([seed, step, 0x70CE5]).random_raw(num_images * num_patches)
    order = np.argsort(bits.reshape(num_images, num_patches), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, : num_kept(keep_rate, num_patches)], axis=1))


def keep_patches(
    tokens: Float[Tensor, "b n d"], keep: float | Int[Tensor, "b k"]
) -> Float[Tensor, "b k d"]:
    """The tokens of the patches that are kept.

    keep: their numbers per image, or a keep rate, which keeps the same scattered patches of every
    image, so that an embedding does not depend on the rest of the batch.
    """
    if not isinstance(keep, Tensor):
        chosen = permutation(tokens.shape[1], 0)[: num_kept(keep, tokens.shape[1])]
        return tokens[:, torch.from_numpy(np.sort(chosen)).to(tokens.device)]
    return tokens.gather(1, keep.to(tokens.device)[:, :, None].expand(-1, -1, tokens.shape[2]))
