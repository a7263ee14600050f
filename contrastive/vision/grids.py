"""The grid of patches that a picture is cut into: which are possible, and the best for a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from contrastive.vision.resize import default_patch_sizes
from data.batch import Cut
from data.config import Fit
from data.errors import UsageError

OFF_WEIGHT = 3.0
"""Of the squared logarithm of how far the aspect ratio is off, against the logarithm of the unused
share. With a weight of 1 a square picture gets 8 x 6 of 48 tokens, with 10 it leaves 12 unused."""


@dataclass(frozen=True)
class PatchGrid:
    """`rows` x `columns` patches of `patch_size` pixels a side."""

    rows: int
    columns: int
    patch_size: int

    @property
    def num_tokens(self) -> int:
        """Patches; class tokens and registers are not counted."""
        return self.rows * self.columns

    @property
    def height(self) -> int:
        """Pixels."""
        return self.rows * self.patch_size

    @property
    def width(self) -> int:
        """Pixels."""
        return self.columns * self.patch_size


@dataclass(frozen=True)
class GridCuts:
    """`data.transform.Cuts` by grids: what loader processes resize images to, without the tower."""

    image_size: int
    fit: Fit
    asked: tuple[tuple[int, int | None], ...]
    """(max_tokens, patch size) for each way of reading, as `choose_grid` takes them; a patch size
    of squares is of one of `image_size`, whatever the first says."""

    def __call__(self, shape: tuple[int, int]) -> list[Cut]:
        return [self._cut(shape, *asked) for asked in self.asked]

    def _cut(self, shape: tuple[int, int], max_tokens: int, patch_size: int | None) -> Cut:
        if patch_size is not None and self.fit != "aspect":
            return Cut(self.image_size, self.image_size, patch_size)
        grid = choose_grid(shape, max_tokens, self.image_size, self.fit, patch_size)
        return Cut(grid.height, grid.width, grid.patch_size)


@lru_cache(maxsize=4096)
def choose_grid(
    shape: tuple[int, int],
    max_tokens: int,
    image_size: int,
    fit: Fit = "crop",
    patch_size: int | None = None,
) -> PatchGrid:
    """The grid of at most `max_tokens` patches for a picture of `shape` = (height, width).

    crop, squash: the largest square. aspect: the rows and columns that lose least, where an aspect
    ratio 15% off weighs as much as 6% of the budget unused, and twice as far off four times that.
    image_size: where no `patch_size` is given, the patches are the largest with which the grid has
    no more pixels than a square of this side, so that 16 tokens at 224 px are patches of 56.
    Raises `UsageError` for a budget below one token, or above one a pixel of that square.
    """
    if not 1 <= max_tokens <= image_size**2:
        raise UsageError(f"max_tokens {max_tokens}: allowed are 1 to {image_size**2}")
    if min(shape) < 1:
        raise UsageError(f"a picture of {shape[0]} x {shape[1]} px has no pixels")
    rows = columns = math.isqrt(max_tokens)
    if fit == "aspect":
        few, many = _nearest_aspect(min(shape) / max(shape), max_tokens)
        # so turned pictures get turned grids, where two are equally good too
        rows, columns = (few, many) if shape[0] <= shape[1] else (many, few)
    largest = max(1, math.isqrt(image_size**2 // (rows * columns)))
    return PatchGrid(rows, columns, largest if patch_size is None else patch_size)


def _nearest_aspect(aspect: float, max_tokens: int) -> tuple[int, int]:
    """(rows, columns) as `choose_grid` has them; `aspect` is height / width, at most 1."""

    def loss(grid: tuple[int, int]) -> float:
        rows, columns = grid
        unused, off = math.log(max_tokens / (rows * columns)), math.log(rows / columns / aspect)
        return unused + OFF_WEIGHT * off**2

    def columns(rows: int) -> set[int]:
        """The loss falls, then rises: the best whole numbers beside its least."""
        best = rows / aspect * math.exp(0.5 / OFF_WEIGHT)
        most = max_tokens // rows
        return {max(1, min(near, most)) for near in (math.floor(best), math.ceil(best))}

    grids = [(r, c) for r in range(1, max_tokens + 1) for c in sorted(columns(r))]
    return min(grids, key=loss)


def check_divides(
    patch_size: int, shape: tuple[int, int], offered: Sequence[int], own: int
) -> None:
    """Raise `UsageError` unless `patch_size` divides both sides of `shape` = (height, width).

    offered, own: a tower's patch sizes, and that of its stored kernel; what is allowed is said of
    the offered, of others where none of them fits.
    """

    def divides(size: int) -> bool:
        return 1 <= size <= min(shape) and not any(side % size for side in shape)

    if divides(patch_size):
        return
    height, width = shape
    square = height == width
    allowed = [size for size in offered if divides(size)]
    if not allowed and square:
        allowed = [size for size in default_patch_sizes(height, own) if divides(size)]
    elif not allowed:
        sizes = range(min(shape), 0, -1)
        allowed = [size for size in sizes if divides(size) and 4 <= max(shape) // size <= 30]
    where = f"{height} px" if square else f"{height} x {width} px"
    what = f"the image side of {where}" if square else f"height and width of {where}"
    raise UsageError(
        f"patch size {patch_size} does not divide {what}; "
        f"allowed at {where}: {', '.join(map(str, allowed)) or 'none'}"
    )
