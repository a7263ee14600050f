"""What a patch size and a grid change of a tower: its kernel and positions, resized once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.vision.patch_dropout import keep_patches
from contrastive.vision.resize import PositionResize, resample_patch_embed

MAX_STEMS = 64  # that a tower keeps, one per patch size and grid
MAX_STEM_BYTES = 2**28  # of all of them: a kernel of 57 px has 15 MB at width 384


class Stem(NamedTuple):
    """All that a patch size and a grid change."""

    kernel: Float[Tensor, "d 3 p p"]
    prefix: Float[Tensor, "1 k d"]
    """Class tokens and registers with their positions."""
    positions: Float[Tensor, "1 n d"]
    """Of the grid; of a tower without any, one that is 0."""

    def place(
        self, patches: Float[Tensor, "b n d"], keep: float | Int[Tensor, "b k"] = 1.0
    ) -> Float[Tensor, "b m d"]:
        """Patches with their positions, those that are kept, after the prefix."""
        tokens = patches + self.positions
        if isinstance(keep, Tensor) or keep < 1:
            tokens = keep_patches(tokens, keep)
        if self.prefix.shape[1]:
            tokens = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens


class Stems:
    """Those of one tower."""

    def __init__(self) -> None:
        self.kept: dict[tuple, Stem] = {}

    def __call__(
        self, family: Any, net: Any, rule: PositionResize, patch_size: int, grid: tuple[int, int]
    ) -> Stem:
        """The stem at one patch size, for a grid of (rows, columns). rule: of the positions.

        Kept until a stored weight changes, so that no call resizes anything; a tower in training
        computes it in each call, differentiably.
        """
        weights = family.stem_weights(net)
        if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
            return resized_stem(family, net, rule, patch_size, grid)
        state = tuple((w.data_ptr(), w._version) for w in weights)
        key = (patch_size, grid, weights[0].dtype, weights[0].device, state)
        stem = self.kept.get(key)
        if stem is None:
            known = list(self.kept.items())
            if any(other[2:] != key[2:] for other, _ in known):
                self.kept.clear()
                known.clear()
            same = (kept.kernel for other, kept in known if other[0] == patch_size)
            kernel = next(same, None)  # of all its grids
            with torch.inference_mode(False), torch.no_grad():
                parts = resized_stem(family, net, rule, patch_size, grid, kernel)
                stem = Stem(*(p if p is kernel else p.detach().clone() for p in parts))
            kept = [*known, (key, stem)]
            while len(kept) > 1 and (len(kept) > MAX_STEMS or _num_bytes(kept) > MAX_STEM_BYTES):
                self.kept.pop(kept.pop(0)[0], None)
            self.kept[key] = stem
        return stem


def resized_stem(
    family: Any,
    net: Any,
    rule: PositionResize,
    patch_size: int,
    grid: tuple[int, int],
    kernel: Tensor | None = None,
) -> Stem:
    """kernel: of this patch size, where it is resized already."""
    if kernel is None:
        kernel = resample_patch_embed(family.kernel(net), (patch_size, patch_size))
    width = kernel.shape[0]
    tokens = family.prefix(net)
    prefix = torch.cat(tokens, dim=1) if tokens else kernel.new_zeros(1, 0, width)
    slots, _ = family.positions(net)
    if slots is not None:
        prefix = prefix + slots
    positions = family.resized_positions(net, grid, rule)
    if positions is None:
        positions = kernel.new_zeros(1, 1, width)
    return Stem(kernel, prefix, positions)


def _num_bytes(stems: Sequence[tuple[tuple, Stem]]) -> int:
    """Of different tensors: grids of one patch size share its kernel."""
    return sum({id(part): part.nbytes for _, stem in stems for part in stem}.values())
