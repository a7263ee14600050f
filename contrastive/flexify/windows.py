"""Random shapes: the rectangle of its images that a training step looks at.

Teacher and student see the same part of every image, each at its own grid, as `choose_grid` gives
a picture of that shape. Cutting keeps the aspect ratio of what is seen, as `fit` aspect does.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive.vision.grids import choose_grid
from contrastive.vision.tower import VisionTower
from data.batch import Cut


@dataclass(frozen=True)
class Window:
    """A part of square images, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def __call__(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 h w"]:
        bottom, right = self.top + self.height, self.left + self.width
        return images[..., self.top : bottom, self.left : right]


def draw_window(max_aspect: float, side: int, seed: int, step: int) -> Window:
    """The window of a step: the same on all ranks, a pure function of (seed, step).

    max_aspect: height over width is 1 / max_aspect to max_aspect, uniform in its logarithm; 1: the
    whole square. One side is the image's own; where the window lies is uniform. side: of the
    images, in pixels.
    """
    if max_aspect == 1:
        return Window(0, 0, side, side)
    shape, place = np.random.default_rng([seed, step, 0x5A9E]).random(2)
    aspect = max_aspect ** (2 * shape - 1)
    height, width = round(side * min(1, aspect)), round(side * min(1, 1 / aspect))
    return Window(round(place * (side - height)), round(place * (side - width)), height, width)


def loaded_side(image_size: int, max_aspect: float) -> int:
    """Side of the square in which the longest window has as many pixels as one of `image_size`."""
    return math.ceil(image_size * math.sqrt(max_aspect))


def cut_for(tower: VisionTower, patch_size: int, shape: tuple[int, int], *, any_patch: bool) -> Cut:
    """What a tower reads of images of (height, width): squares at `patch_size`, of rectangles as
    many patches as that gives of a square, or the fewer that fit the shape.

    any_patch: whether they may be smaller or larger, so that no pixels are added or lost.
    """
    size = tower.image_size
    if shape[0] == shape[1]:
        return Cut(size, size, patch_size)
    budget = (size // patch_size) ** 2
    grid = choose_grid(shape, budget, size, "aspect", None if any_patch else patch_size)
    return Cut(grid.height, grid.width, grid.patch_size)


def resize_images(
    images: Float[Tensor, "b 3 h w"], size: tuple[int, int]
) -> Float[Tensor, "b 3 t u"]:
    """Bicubic with antialias, like the loader's transform, to (height, width); unchanged if the
    size is right."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
