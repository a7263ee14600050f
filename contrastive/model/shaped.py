"""Images of any shape as pixels for a tower, and what shares a forward of it."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive.distributed import send
from contrastive.vision.grids import PatchGrid, choose_grid
from contrastive.vision.packed.forward import packed_features, packs
from contrastive.vision.tower import VisionTower
from data.batch import ShapedImages
from data.errors import UsageError
from data.given import Images, as_rgb, is_normalised, is_pixel_batch, list_images

MAX_PACKED = {"cpu": 2**11, "cuda": 2**16}
"""Tokens of one sequence by type of device, which bounds its memory; on a CPU neither half as many
nor twice as many are faster."""


class ShapedPixels(NamedTuple):
    """Normalised pixels, and the patch size to read them at; None: the tower's finest."""

    patch_size: int | None
    pixels: Float[Tensor, "3 h w"]


def shaped_pixels(
    tower: VisionTower, image: Any, patch_size: int | None, max_tokens: int | None
) -> ShapedPixels:
    """One of `data.given.Images` as `tower` reads it at a patch size, within a budget, or both.

    Raises as `LitModel.encode_image`.
    """
    if is_normalised(image):
        if max_tokens is not None:
            raise UsageError(
                "max_tokens chooses how images are resized; pixels that are already normalised "
                "take a patch size instead"
            )
        return ShapedPixels(patch_size, image)
    transform = tower.transform
    if max_tokens is None and transform.fit != "aspect":
        return ShapedPixels(patch_size, transform(as_rgb(image)))
    picture = as_rgb(image)
    grid = grid_of(tower, (picture.height, picture.width), patch_size, max_tokens)
    pixels = transform.at(picture, grid.height, grid.width)
    return ShapedPixels(grid.patch_size, transform.normalise(pixels))


def read_pixels(tower: VisionTower, images: ShapedImages) -> list[ShapedPixels]:
    """What loader processes resized, normalised on the tower's device."""
    device = next(tower.parameters()).device
    flat = send(images.pixels, device)[:, None]
    views = images.views(tower.transform.normalise(flat)[:, 0])
    return [ShapedPixels(cut.patch_size, v) for cut, v in zip(images.cuts, views, strict=True)]


def pixels_of_one_shape(
    tower: VisionTower, images: Images, patch_size: int | None
) -> Float[Tensor, "b 3 h w"]:
    """Normalised pixels of images, as `tower` reads them at a patch size. Raises as
    `LitModel.encode_patches`."""
    if is_pixel_batch(images):
        return images
    shaped = [shaped_pixels(tower, image, patch_size, None) for image in list_images(images)]
    if not shaped:
        raise UsageError("no images: at least one, whose shape the map has")
    shapes = {tuple(one.pixels.shape[1:]) for one in shaped}
    if len(shapes) > 1:
        raise UsageError(f"images of {len(shapes)} shapes: one is needed for all")
    return torch.stack([one.pixels for one in shaped])


def grid_of(
    tower: VisionTower, shape: tuple[int, int], patch_size: int | None, max_tokens: int | None
) -> PatchGrid:
    """The grid that `tower` reads a picture of (height, width) by.

    Without a budget, as many tokens as a square of the tower's image size has. Raises `UsageError`
    for a tower with one patch size, and for a budget below one token.
    """
    check_reads_shapes(tower)
    if max_tokens is None:
        patch_size = tower.patch_sizes[-1] if patch_size is None else patch_size
        tower.check_patch_size(patch_size)
        max_tokens = (tower.image_size // patch_size) ** 2
    elif patch_size is not None and patch_size < 1:
        raise UsageError(f"patch size {patch_size}: at least 1 px")
    return choose_grid(shape, max_tokens, tower.image_size, tower.transform.fit, patch_size)


def check_reads_shapes(tower: VisionTower) -> None:
    """Raise `UsageError` for a tower with one patch size."""
    if not tower.flexible:
        raise UsageError(
            f"{tower.config.name} reads squares of {tower.image_size} px at patch size "
            f"{tower.patch_sizes[0]} alone: neither max_tokens nor fit aspect can be had; "
            "allowed: fit crop or squash"
        )


def shaped_features(tower: VisionTower, images: Sequence[ShapedPixels]) -> Float[Tensor, "n f"]:
    """What `tower` gives for each image, float32, on the tower's device.

    Images of one shape share a forward; where the tower can, those of several do too, as one
    sequence (`contrastive.vision.packed`). Raises `UsageError` for a patch size that does not
    divide an image's sides.
    """
    device = next(tower.parameters()).device
    features = torch.empty(len(images), tower.embed_dim, device=device)
    if len({(size, pixels.shape) for size, pixels in images}) < 2 or not packs(tower):
        for patch_size, places, pixels in by_shape(images):
            features[send(torch.tensor(places), device)] = tower(pixels.to(device), patch_size)
        return features
    finest = tower.patch_sizes[-1]
    num_tokens = [
        tower.num_tokens(finest if size is None else size, (pixels.shape[1], pixels.shape[2]))
        for size, pixels in images
    ]
    for part in _packs(num_tokens, MAX_PACKED.get(device.type, 2**11)):
        groups = list(by_shape([images[place] for place in part]))
        packed = [
            (finest if size is None else size, pixels.to(device)) for size, _, pixels in groups
        ]
        order = [part[number] for _, numbers, _ in groups for number in numbers]
        features[send(torch.tensor(order), device)] = packed_features(tower, packed)
    return features


def _packs(num_tokens: Sequence[int], most: int) -> list[list[int]]:
    """Places by number of tokens, cut into sequences of about as many, about `most` at most."""
    order = sorted(range(len(num_tokens)), key=lambda place: num_tokens[place])
    each = sum(num_tokens) / math.ceil(sum(num_tokens) / most)
    packs, so_far = defaultdict(list), 0
    for place in order:
        packs[int(so_far / each)].append(place)
        so_far += num_tokens[place]
    return list(packs.values())


def by_shape(
    images: Sequence[ShapedPixels],
) -> Iterator[tuple[int | None, list[int], Float[Tensor, "b 3 h w"]]]:
    """(patch size, places, pixels) of the images of each shape."""
    places = defaultdict(list)
    for place, image in enumerate(images):
        places[image.patch_size, image.pixels.shape].append(place)
    for (patch_size, _), same in places.items():
        yield patch_size, same, torch.stack([images[place].pixels for place in same])
