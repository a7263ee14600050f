"""One forward of a tower for pictures of several shapes and patch sizes."""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.vision.packed.block_diagonal import WithinPictures, can_pack
from contrastive.vision.packed.stem import embed_groups
from contrastive.vision.tower import VisionTower


def packs(tower: VisionTower) -> bool:
    """Whether `packed_features` takes this tower; a tower in training takes one shape at a time."""
    return tower.flexible and not tower.training and can_pack(tower.net.blocks)


def packed_features(
    tower: VisionTower, groups: Sequence[tuple[int, Float[Tensor, "_ 3 _ _"]]]
) -> Float[Tensor, "n d"]:
    """What `tower(images, patch_size)` gives for each (patch size, images), one after another.

    The images' tokens go through the blocks as one sequence. Groups of as many tokens a picture
    should stand together: they share a call of the attention.
    """
    net, family = tower.net, tower.family
    rotary = []
    for patch_size, images in groups:
        height, width = images.shape[-2:]
        tower.check_patch_size(patch_size, (height, width))
        turns = tower.rotary_positions((height // patch_size, width // patch_size))
        if turns is not None:
            rotary += [_still(turns, tower.num_prefix_tokens), turns] * len(images)
    embedded = embed_groups(tower, groups)
    tokens, shapes = [t.flatten(0, 1) for t in embedded], [t.shape[:2] for t in embedded]
    runs = [
        (sum(count for count, _ in same), length)
        for length, same in groupby(shapes, key=lambda shape: shape[1])
    ]
    packed = torch.cat(tokens)[None]
    # a block leaves the prefix of the sequence as it is
    turns = torch.cat(rotary)[tower.num_prefix_tokens :] if rotary else None
    within = WithinPictures(runs, packed.device)
    after = family.after(net, packed, turns, tower.needed_blocks, within)
    features, start = [], 0
    for count, length in runs:
        end = start + count * length
        parts = {n: part[0, start:end].unflatten(0, (count, length)) for n, part in after.items()}
        features.append(tower.read_blocks(parts).float())
        start = end
    return torch.cat(features)


def _still(rotary: Float[Tensor, "n e"], count: int) -> Float[Tensor, "k e"]:
    """Sines and cosines that turn nothing, for tokens without a position."""
    sines, cosines = rotary.new_zeros(count, rotary.shape[1]).chunk(2, dim=-1)
    return torch.cat([sines, cosines + 1], dim=-1)
