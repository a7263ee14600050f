"""Batches of pictures and labels: no captions, and random changes if asked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from data.batch import Batch
from data.captions import Texts, draw, read_label
from data.config import DataConfig
from data.images import ImageTransform, decode_image
from data.pipeline.captioned import TrainPipeline
from data.pipeline.order import derived_seed
from data.pipeline.slots import Slots
from data.shards.tar import Located

Change = Callable[[Image.Image], Image.Image]
"""A random change of an RGB image, by torch's own randomness; same size or not."""


@dataclass(frozen=True)
class PictureSlots(Slots):
    """Slots that hold pixels and labels, and no caption."""

    change: Change | None = None  # besides the views of `cfg`; another one in every epoch
    labels: bool = False  # whether KEY.cls is read

    def empty(self, size: int) -> Batch:
        part = super().empty(size)
        if self.labels:
            part.labels = torch.full((size,), -1, dtype=torch.int64)
        return part

    def fill(self, part: Batch, row: int, sample: Located | Texts, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`, and the slot has its key alone."""
        assert isinstance(sample, Located)
        part.keys[row] = sample.key
        label = read_label(sample.payloads) if self.labels else -1
        view = draw(self.cfg.views, self.seed, epoch, sample.key, "view")
        if part.images is not None and self.transform is not None:
            image = decode_image(sample.payloads[sample.image_ext], self.cfg.max_pixels)
            image = self.cfg.augment(image, sample.key, view)
            if self.change is not None:
                image = self._changed(image, epoch, sample.key)
            part.images[row] = self.transform(image)
        if part.labels is not None:
            part.labels[row] = label
        part.views[row] = view
        part.valid[row] = True

    def _changed(self, image: Image.Image, epoch: int, key: str) -> Image.Image:
        """The same for any ranks and loader workers."""
        assert self.change is not None
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        seed = derived_seed(self.seed, epoch, int.from_bytes(digest, "big"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.change(image)


class PicturePipeline(TrainPipeline):
    """A `TrainPipeline` of pictures: the same order, samples with or without captions."""

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform,
        change: Change | None = None,
        *,
        labels: bool = False,
        **options: Any,
    ) -> None:
        """change: seeded by (seed, epoch, key). labels: read KEY.cls.

        options: `TrainPipeline`'s own.
        """
        super().__init__(cfg, transform, **options)
        self._slots = PictureSlots(transform, None, cfg, options["seed"], change, labels)
