"""What a patch size costs per image: tokens, GFLOPs, measured speed of the image tower."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contrastive.distributed import is_main
from contrastive.image_features import full_batch
from contrastive.model.lit import LitModel
from contrastive.vision.tower import VisionTower
from data.progress import Progress
from retrieval.detail import Detail
from retrieval.machine_load import OthersLoad, warn_if_busy, warn_if_shared
from retrieval.tower_speed import SPELL_S, square_image, time_forwards


@dataclass(frozen=True)
class PatchCost:
    """What one patch size costs per image."""

    patch_size: Detail  # pixels, or a budget of tokens: then of a square image
    tokens: int
    gflops: float  # 2 x multiply-adds, 10^9
    images_per_second: tuple[float, float, float]  # median, lowest, highest of the repeats


def measure_costs(
    model: LitModel | VisionTower,
    patch_sizes: Sequence[Detail],
    batch_size: int | None = None,
    repeats: int = 5,
    spell_s: float = SPELL_S,
) -> list[PatchCost]:
    """Tokens, GFLOPs and measured speed of the image tower, over random pixels.

    batch_size: images of a forward; None takes as many as fill the device. The repeats of the patch
    sizes are interleaved, so a machine that slows down slows all alike; each repeats its forward
    for spell_s seconds (once, where that takes longer). Says so on stderr, once, where other
    programs disturb them.
    """
    tower = model.vision if isinstance(model, LitModel) else model
    device = next(tower.parameters()).device
    squares = {size: square_image(tower, size) for size in patch_sizes}
    tokens = {size: tower.num_tokens(*square) for size, square in squares.items()}
    batches = {size: batch_size or full_batch(tokens[size], device) for size in patch_sizes}
    load = OthersLoad()
    with (
        Progress(
            total=repeats * len(patch_sizes),
            desc="timing the tower",
            leave=False,
            disable=not is_main(),
        ) as bar,
        torch.no_grad(),
    ):
        seconds = time_forwards(
            lambda pixels, size: tower(pixels, squares[size][0]), tower.image_size, device,
            batches, repeats, spell_s, lambda _: bar.update(1),
            {size: shape for size, (_, shape) in squares.items()},
        )  # fmt: skip
    warn_if_busy(load.share(), "images/s")
    warn_if_shared(device, "images/s")
    speeds = {size: [1 / second for second in seconds[size]] for size in patch_sizes}
    return [
        PatchCost(
            size,
            tokens[size],
            tower.gflops(*squares[size]),
            (statistics.median(speeds[size]), min(speeds[size]), max(speeds[size])),
        )
        for size in patch_sizes
    ]
