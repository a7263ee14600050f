"""Batches of images with or without a label, for training that needs no captions."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from data.batch import OpenBatch
from data.captions import read_label
from data.config import DataConfig
from data.pipeline.order import derived_seed
from data.pipeline.slots import Slots
from data.pipeline.training import TrainPipeline
from data.shards.tar import TarSample
from data.transform import ImageTransform

Change = Callable[[Image.Image], Image.Image]
"""A random change of an RGB image, its size included, by torch's global generator."""


@dataclass(frozen=True)
class LabelledSlots(Slots):
    """Slots that hold pixels and labels, and no caption."""

    random_change: Change | None = None  # on top of the views of `cfg`; another in every epoch
    labels: bool = False  # whether KEY.cls is read

    def empty(self, size: int) -> OpenBatch:
        part = super().empty(size)
        if self.labels:
            part.labels = torch.full((size,), -1, dtype=torch.int64)
        return part

    def fill(self, part: OpenBatch, row: int, sample: TarSample, epoch: int) -> None:
        part.keys[row] = sample.key
        label = read_label(sample.payloads) if self.labels else -1
        self.fill_view(part, row, sample, epoch)
        if part.labels is not None:
            part.labels[row] = label
        part.valid[row] = True

    def change(self, image: Image.Image, epoch: int, key: str) -> Image.Image:
        """`random_change`, the same for any ranks and loader workers."""
        if self.random_change is None:
            return image
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        seed = derived_seed(self.seed, epoch, int.from_bytes(digest, "big"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.random_change(image)


class LabelledPipeline(TrainPipeline):
    """A `TrainPipeline` of images, whether they have captions or not."""

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform,
        change: Change | None = None,
        *,
        labels: bool = False,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`change`: seeded by (seed, epoch, key). `labels`: read KEY.cls.

        The rest, and what is raised: as `TrainPipeline`.
        """
        slots = LabelledSlots(transform, cfg, seed, change, labels)
        super().__init__(
            cfg, slots, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )
