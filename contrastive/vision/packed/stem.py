"""Tokens of pictures of several shapes, by one product for each patch size."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.vision.tower import VisionTower


def embed_groups(
    tower: VisionTower, groups: Sequence[tuple[int, Float[Tensor, "_ 3 _ _"]]]
) -> list[Float[Tensor, "_ _ d"]]:
    """What `tower.embed_patches` gives for each (patch size, images).

    A convolution brings its kernel into an order of its own in every call, which for few pictures
    takes as long as the rest: groups of one patch size share a call.
    """
    images = [pixels.to(tower.family.kernel(tower.net)) for _, pixels in groups]
    of_size = defaultdict(list)
    for number, (patch_size, _) in enumerate(groups):
        of_size[patch_size].append(number)
    tokens: list[Tensor] = [torch.empty(0)] * len(groups)
    for patch_size, numbers in of_size.items():
        if len(numbers) == 1:
            tokens[numbers[0]] = tower.embed_patches(images[numbers[0]], patch_size)
            continue
        grids = [tuple(side // patch_size for side in images[n].shape[-2:]) for n in numbers]
        stems = [tower.stem(patch_size, (rows, columns)) for rows, columns in grids]
        strip = _strip([images[number] for number in numbers], patch_size)
        found = tower.family.patches(tower.net, strip, stems[0].kernel)[0]
        counts = [
            len(images[n]) * rows * cols for n, (rows, cols) in zip(numbers, grids, strict=True)
        ]
        parts = found.split(counts)
        for number, part, stem in zip(numbers, parts, stems, strict=True):
            patches = part.unflatten(0, (len(images[number]), -1))
            tokens[number] = stem.place(patches)
    return tokens


def _strip(images: Sequence[Float[Tensor, "_ 3 _ _"]], patch_size: int) -> Float[Tensor, "1 3 p n"]:
    """All patches beside each other: those of the first image row by row, of the second, ..."""
    grids = [(i.shape[2] // patch_size, i.shape[3] // patch_size) for i in images]
    width = [len(i) * r * c * patch_size for i, (r, c) in zip(images, grids, strict=True)]
    strip = images[0].new_empty(1, 3, patch_size, sum(width))
    for part, of, (rows, columns) in zip(strip.split(width, 3), images, grids, strict=True):
        read = of[..., : rows * patch_size, : columns * patch_size].unflatten(2, (rows, patch_size))
        beside = part[0].unflatten(2, (len(of), rows, columns * patch_size))
        beside.copy_(read.permute(1, 3, 0, 2, 4))
    return strip
