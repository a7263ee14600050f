"""How long forwards of an image tower take: what tables and cost profiles are made of.

A GPU is given batches that fill it, and is waited for: a forward of few tokens would else measure
how fast Python launches kernels, which is the same at every patch size.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from retrieval.detail import D

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
) -> dict[D, list[float]]:
    """Seconds of one image, per patch size and repeat.

    forward: pixels (b, 3, s, s) and a patch size, or what stands for one, to anything.
    batch_sizes: images of a forward, per patch size. spell_s: forwards are repeated for about so
    long between two looks at the clock, and some run before the first; 0 for one forward a look and
    none before. Repeats of the patch sizes are interleaved, so that a machine that slows down slows
    all alike. A GPU without room for a batch gets half of it. told: is told what was measured.
    """
    pixels = torch.randn(max(batch_sizes.values()), 3, image_size, image_size, device=device)
    batches, forwards = dict(batch_sizes), dict.fromkeys(batch_sizes, 1)

    def spell(size: D) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(forwards[size]):
            forward(pixels[: batches[size]], size)
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


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
