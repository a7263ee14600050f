"""What a patch size costs per image: tokens, GFLOPs, measured speed of the image tower."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contrastive.distributed import is_main
from contrastive.model.lit import LitModel
from data.progress import Progress
from retrieval.machine_load import OthersLoad, warn_if_busy


@dataclass(frozen=True)
class PatchCost:
    """What one patch size costs per image."""

    patch_size: int  # pixels
    tokens: int
    gflops: float  # 2 x multiply-adds, 10^9
    images_per_second: tuple[float, float, float]  # median, lowest, highest of the repeats


def measure_costs(
    model: LitModel, patch_sizes: Sequence[int], batch_size: int = 32, repeats: int = 5
) -> list[PatchCost]:
    """Tokens, GFLOPs and measured speed of the image tower, one batch of random pixels at a time.

    The repeats of the patch sizes are interleaved, so a machine that slows down slows all alike.
    Says so on stderr, once, where other programs disturb them.
    """
    side = model.image_size
    pixels = torch.randn(batch_size, 3, side, side, device=model.device)
    speeds: dict[int, list[float]] = {size: [] for size in patch_sizes}
    order = [size for _ in range(repeats) for size in patch_sizes]
    for size in patch_sizes:
        model.encode_image(pixels[: max(1, batch_size // 4)], patch_size=size)  # warm up
    load = OthersLoad()
    for size in Progress(order, desc="timing the tower", leave=False, disable=not is_main()):
        _synchronize(model.device)
        start = time.perf_counter()
        model.encode_image(pixels, patch_size=size)
        _synchronize(model.device)
        speeds[size].append(batch_size / (time.perf_counter() - start))
    warn_if_busy(load.share(), "images/s")
    return [
        PatchCost(
            size,
            model.vision.num_tokens(size),
            model.vision.gflops(size),
            (statistics.median(speeds[size]), min(speeds[size]), max(speeds[size])),
        )
        for size in patch_sizes
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
