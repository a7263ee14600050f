"""How large everything is: as the targets say, or tiny, to see on a CPU that the code runs."""

from dataclasses import dataclass, field
from typing import Any

import torch

from data.config import NUM_WORKERS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def autocast() -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(DEVICE.type, DTYPE, enabled=CUDA)


@dataclass(frozen=True)
class TextShape:
    """A BERT's."""

    layers: int
    width: int
    heads: int


@dataclass(frozen=True)
class Scale:
    """Sizes of one run."""

    tiny: bool = False
    vision: str = "vit_base_patch16_224"
    vision_args: dict[str, Any] = field(default_factory=lambda: {"img_size": 240})
    image_size: int = 240
    patch_sizes: tuple[int, ...] = (48, 30, 24, 20, 16)  # drawn at random
    text: TextShape = TextShape(12, 768, 12)  # BERT-base
    minilm: TextShape = TextShape(6, 384, 12)
    vocabulary: int = 30_522
    samples: int = 32_768  # images on disk
    tars: int = 32
    batch: int = 16_384  # pairs of a cached step
    minilm_batch: int = 32_768
    pixel_batch: int = 4_096  # pairs of an uncached step
    open_clip_batch: int = 1_024
    memory_batches: tuple[int, int, int] = (1_024, 32_768, 1_048_576)
    embed_width: int = 512  # of the memory part's pairs, and of the index
    vectors: int = 1_000_000
    rounds: int = 7
    workers: int = NUM_WORKERS


TINY = Scale(
    tiny=True,
    vision="vit_tiny_patch16_224",
    vision_args={"img_size": 240, "depth": 1},
    patch_sizes=(48, 30, 16),
    text=TextShape(1, 64, 2),
    minilm=TextShape(1, 32, 2),
    vocabulary=500,
    samples=48,
    tars=2,
    batch=32,
    minilm_batch=32,
    pixel_batch=16,
    open_clip_batch=8,
    memory_batches=(16, 32, 48),
    embed_width=64,
    vectors=4_000,
    rounds=2,
    workers=0,
)
