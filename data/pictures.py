"""Batches of pictures and labels: samples need no caption, and a random view may be taken."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from data.batch import Batch
from data.captions import read_label
from data.images import ImageTransform, decode_image
from data.order import derived_seed
from data.pipeline import TrainPipeline
from data.samples import DataConfig, Slots
from data.tar import Located

View = Callable[[Image.Image], Image.Image]
"""A random crop, flip, ... of an RGB image, by torch's own randomness."""


@dataclass(frozen=True)
class PictureSlots(Slots):
    """Slots that hold pixels and labels, and no caption."""

    view: View | None = None  # of the training's random views; None: the whole picture
    labels: bool = False  # whether KEY.cls is read

    def empty(self, size: int) -> Batch:
        part = super().empty(size)
        if self.labels:
            part.labels = torch.full((size,), -1, dtype=torch.int64)
        return part

    def fill(self, part: Batch, row: int, sample: Located, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`, and the slot has its key alone."""
        part.keys[row] = sample.key
        label = read_label(sample.payloads) if self.labels else -1
        if part.images is not None and self.transform is not None:
            image = decode_image(sample.payloads[sample.image_ext], self.max_pixels)
            if self.view is not None:
                image = self._viewed(image, epoch, sample.key)
            part.images[row] = self.transform(image)
        if part.labels is not None:
            part.labels[row] = label
        part.valid[row] = True

    def _viewed(self, image: Image.Image, epoch: int, key: str) -> Image.Image:
        """The view of this sample in this epoch: the same for any ranks and loader workers."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        seed = derived_seed(self.seed, epoch, int.from_bytes(digest, "big"))
        assert self.view is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.view(image)


class PicturePipeline(TrainPipeline):
    """A `TrainPipeline` of pictures: the same order, samples with or without captions."""

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform,
        view: View | None = None,
        *,
        labels: bool = False,
        **options: Any,
    ) -> None:
        """view: a random one, seeded by (seed, epoch, key). labels: read KEY.cls.

        options: `TrainPipeline`'s own.
        """
        super().__init__(cfg, transform, **options)
        self._slots = PictureSlots(transform, cfg.max_pixels, options["seed"], view, labels)
