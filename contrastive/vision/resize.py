"""PI-resize of patch kernels, and resizing of position grids: a ViT at any patch size.

FlexiViT (Beyer et al., arXiv:2212.08013), section 3.4 and equation 4. The numerics are those of the
reference in google-research/big_vision: kernels by the pseudo-inverse of a bilinear resize without
antialiasing, always from the stored kernel; position grids by a plain resize. Which patch sizes a
tower offers follows from its image size: `default_patch_sizes`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Mode = Literal["bilinear", "bicubic"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class PositionResize:
    """How a tower's position grid is resized. big_vision: bilinear with antialias."""

    mode: Mode = "bilinear"
    antialias: bool = True


@lru_cache(maxsize=256)
def _pi_resize_matrix(old: int, new: int) -> Float[Tensor, "new old"]:
    """pinv(B^T) in float64, where B (new x old) resizes a vector bilinearly, half-pixel centres."""
    identity = torch.eye(old, dtype=torch.float64)[:, None, :]  # each row is one unit impulse
    resize = F.interpolate(identity, size=new, mode="linear", align_corners=False)[:, 0].T
    return torch.linalg.pinv(resize.T)


def resample_patch_embed(
    weight: Float[Tensor, "out in h w"], size: tuple[int, int]
) -> Float[Tensor, "out in h2 w2"]:
    """PI-resize a patch kernel to `size` = (h2, w2); differentiable; same dtype and device.

    The result is the kernel whose inner products with bilinearly resized patches stay closest to
    those of `weight` with the original patches (equation 4); when the kernel grows they are equal.
    The two axes separate: pinv(A kron B) = pinv(A) kron pinv(B). Computed in float64, but where
    gradients are wanted in float32, three times as fast, because each step then computes it anew.
    """
    if min(size) < 1:
        raise ValueError(f"kernel size {size} is not positive")
    if tuple(weight.shape[-2:]) == tuple(size):
        return weight
    training = torch.is_grad_enabled() and weight.requires_grad
    wide = torch.promote_types(weight.dtype, torch.float32) if training else torch.float64
    rows, columns = (
        _pi_resize_matrix(old, new).to(weight.device, wide)
        for old, new in zip(weight.shape[-2:], size, strict=True)
    )
    return (rows @ weight.to(wide) @ columns.T).to(weight.dtype)


def resample_position_grid(
    grid: Float[Tensor, "1 n d"], size: tuple[int, int], rule: PositionResize
) -> Float[Tensor, "1 m d"]:
    """Resize a square grid of position embeddings (no prefix slots) to `size` = (rows, columns)."""
    old = round(grid.shape[1] ** 0.5)
    if old * old != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} positions are not a square grid")
    if (old, old) == size:
        return grid
    wide = torch.promote_types(grid.dtype, torch.float32)
    square = grid.to(wide).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    one_column = size[0] > size[1] == 1  # which torch 2.15 computes wrongly, and one row rightly
    resized = F.interpolate(
        square.mT if one_column else square,
        size=size[::-1] if one_column else size,
        mode=rule.mode,
        align_corners=False,
        antialias=rule.antialias,
    )
    resized = resized.mT if one_column else resized
    return resized.permute(0, 2, 3, 1).reshape(1, size[0] * size[1], -1).to(grid.dtype)


def restored_patch_embed(
    weight: Float[Tensor, "out in h w"], size: int, patch_size: int
) -> Float[Tensor, "out in s s"]:
    """A kernel of another stored size that resizes to the same kernel at `patch_size`.

    PI-resizing to a larger size and back does not restore a kernel, so the smallest correction that
    makes it exact is added. It exists where `size` >= `patch_size`; else the result is the plain
    PI-resize.
    """
    resized = resample_patch_embed(weight, (size, size))
    if size < patch_size:
        return resized
    target = resample_patch_embed(weight, (patch_size, patch_size))
    back = _pi_resize_matrix(size, patch_size).to(weight.device)
    return _corrected(resized, target, back)


def restored_position_grid(
    grid: Float[Tensor, "1 n d"], size: int, side: int, rule: PositionResize
) -> Float[Tensor, "1 m d"]:
    """A grid of `size` x `size` stored positions that resizes to the same grid at `side` x `side`.

    As `restored_patch_embed`: exact where `size` >= `side`.
    """
    resized = resample_position_grid(grid, (size, size), rule)
    if size < side:
        return resized
    target = resample_position_grid(grid, (side, side), rule)
    impulses = torch.eye(size, dtype=torch.float64, device=grid.device)[:, None, :, None]
    back = F.interpolate(
        impulses.expand(-1, -1, -1, size),  # torch 2.15 resizes a single column wrongly
        size=(side, side),
        mode=rule.mode,
        align_corners=False,
        antialias=rule.antialias,
    )[:, 0, :, 0].T
    wide, narrow = (g[0].T.reshape(1, -1, n, n) for g, n in ((resized, size), (target, side)))
    return _corrected(wide, narrow, back)[0].flatten(1).T[None].contiguous()


def _corrected(
    values: Float[Tensor, "out in s s"],
    target: Float[Tensor, "out in p p"],
    back: Float[Tensor, "p s"],
) -> Float[Tensor, "out in s s"]:
    """The nearest values (least squares) that `back` resizes to the target."""
    inverse = torch.linalg.pinv(back)
    missing = target.double() - back @ values.double() @ back.T
    return (values.double() + inverse @ missing @ inverse.T).to(values.dtype)


def default_patch_sizes(image_size: int, own: int | None = None) -> tuple[int, ...]:
    """Patch sizes offered at `image_size`, coarsest first: its divisors with grids of 4 to 30.

    At 240 px these are the ten sizes FlexiViT was trained with (grids 5 to 30). A tower's own
    patch size is among them wherever it divides the image.
    """
    smallest_grid = 5 if image_size == 240 else 4
    sizes = {p for p in range(1, image_size + 1) if image_size % p == 0}
    sizes = {p for p in sizes if smallest_grid <= image_size // p <= 30}
    if own and image_size % own == 0:
        sizes.add(own)
    return tuple(sorted(sizes, reverse=True))
