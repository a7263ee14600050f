"""Pictures of many shapes and budgets, as clients of a service ask for them at once."""

import numpy as np
import torch
from torch import Tensor

from contrastive.model.shaped import ShapedPixels, by_shape
from contrastive.vision.grids import choose_grid
from contrastive.vision.tower import VisionTower

ASPECTS = ((1, 1), (2, 3), (3, 2), (1, 2))  # height to width
BUDGETS = (16, 36, 64, 100, 196)  # tokens


def num_patches(image: ShapedPixels) -> int:
    height, width = image.pixels.shape[-2:]
    assert image.patch_size is not None
    return height * width // image.patch_size**2


def draw_requests(tower: VisionTower, count: int) -> list[ShapedPixels]:
    """Each aspect ratio at each budget once, the rest at random; random pixels."""
    rng = np.random.default_rng(0)
    pairs = [(aspect, budget) for aspect in ASPECTS for budget in BUDGETS]
    more = rng.integers(0, len(pairs), count - len(pairs))
    chosen = pairs + [pairs[number] for number in more]
    torch.manual_seed(0)
    requests = []
    for number in rng.permutation(count):
        (rows, columns), budget = chosen[number]
        grid = choose_grid((200 * rows, 200 * columns), budget, tower.image_size, "aspect")
        pixels = torch.randn(3, grid.height, grid.width)
        requests.append(ShapedPixels(grid.patch_size, pixels))
    return requests


def squares(tower: VisionTower, like: list[ShapedPixels]) -> list[ShapedPixels]:
    """As many, each of about their mean number of patches."""
    side = round(float(np.mean([num_patches(image) for image in like])) ** 0.5)
    patch_size = tower.image_size // side
    pixels = torch.randn(3, side * patch_size, side * patch_size)
    return [ShapedPixels(patch_size, pixels) for _ in like]


@torch.no_grad()
def grouped(tower: VisionTower, images: list[ShapedPixels]) -> Tensor:
    """One forward for each shape."""
    weight = next(tower.parameters())
    features = torch.empty(len(images), tower.embed_dim, device=weight.device)
    for patch_size, places, pixels in by_shape(images):
        features[places] = tower(pixels.to(weight.device), patch_size)
    return features
