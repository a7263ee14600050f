"""How long forwards of an image tower take: what tables and cost profiles are made of.

A GPU is given batches that fill it, and is waited for: a forward of few tokens would else measure
how fast Python launches kernels, which is the same at every patch size.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from contrastive.model.shaped import grid_of
from contrastive.vision.tower import VisionTower
from retrieval.detail import D, Detail

SPELL_S = 0.05  # that a GPU works between two looks at the clock
MAX_FORWARDS = 1000  # a spell


def time_forwards(
    forward: Callable[[Tensor, D], Tensor],
    image_size: int,
    device: torch.device,
    batch_sizes: Mapping[D, int],
    repeats: int,
    spell_s: float = 0.0,
    told: Callable[[D], object] = lambda patch_size: None,
    shapes: Mapping[D, tuple[int, int]] | None = None,
) -> dict[D, list[float]]:
    """Seconds of one image, per patch size and repeat.

    forward: pixels (b, 3, s, s) and a patch size, or what stands for one, to anything.
    batch_sizes: images of a forward, per patch size. spell_s: forwards are repeated for about so
    long between two looks at the clock, and some run before the first; 0 for one forward a look and
    none before. Repeats of the patch sizes are interleaved, so that a machine that slows down slows
    all alike. A GPU without room for a batch gets half of it. told: is told what was measured.
    shapes: (height, width) of the pixels where they are no squares of `image_size`.
    """
    square, shapes = (image_size, image_size), shapes or {}
    pixels: dict[tuple[int, int], Tensor] = {}
    for size in batch_sizes:
        shape = shapes.get(size, square)
        if shape not in pixels:
            most = max(n for other, n in batch_sizes.items() if shapes.get(other, square) == shape)
            pixels[shape] = torch.randn(most, 3, *shape, device=device)
    batches, forwards = dict(batch_sizes), dict.fromkeys(batch_sizes, 1)

    def spell(size: D) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(forwards[size]):
            forward(pixels[shapes.get(size, square)][: batches[size]], size)
        synchronize(device)
        return (time.perf_counter() - start) / forwards[size]

    if spell_s:
        for size in batch_sizes:
            seconds = _fit(spell, batches, size)
            if seconds < spell_s:
                seconds = spell(size)  # the first chose kernels and took memory
            forwards[size] = min(MAX_FORWARDS, max(1, round(spell_s / max(seconds, 1e-9))))
    seconds_of: dict[D, list[float]] = {size: [] for size in batch_sizes}
    for _ in range(repeats):
        for size in batch_sizes:
            seconds_of[size].append(spell(size) / batches[size])
            told(size)
    return seconds_of


def _fit(spell: Callable[[D], float], batches: dict[D, int], size: D) -> float:
    """Seconds of a first forward, of half the images as long as they do not fit the memory."""
    while True:
        try:
            return spell(size)
        except torch.OutOfMemoryError:
            if batches[size] == 1:
                raise
            batches[size] //= 2


def square_image(tower: VisionTower, detail: Detail) -> tuple[int, tuple[int, int]]:
    """The patch size at which a square image is read, and its height and width then. Raises
    `UsageError` for a budget of a tower that has none."""
    square = (tower.image_size, tower.image_size)
    if isinstance(detail, int):
        return detail, square
    grid = grid_of(tower, square, None, detail.count)
    return grid.patch_size, (grid.height, grid.width)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
