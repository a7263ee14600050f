"""The slots of a training batch, and how samples fill them."""

from dataclasses import dataclass

import torch
from PIL import Image

from data.batch import OpenBatch
from data.config import DataConfig
from data.images import decode_image
from data.pipeline.draw import draw
from data.shards.tar import TarSample
from data.token_ids import TokenIds
from data.transform import ImageTransform


@dataclass(frozen=True)
class Slots:
    """How samples fill the slots of a training batch; each pipeline has its own `fill`."""

    transform: ImageTransform | None  # None: pixels are not read
    cfg: DataConfig
    seed: int  # of the draws of captions and views

    def empty(self, size: int) -> OpenBatch:
        """A part of a batch whose slots are all bad."""
        images = None
        if self.transform is not None:
            images = torch.zeros(size, 3, self.transform.image_size, self.transform.image_size)
        return OpenBatch(
            step=0,
            keys=[""] * size,
            images=images,
            captions=[""] * size,
            tokens=TokenIds.empty(size),
            concepts=torch.zeros(size, dtype=torch.int64),
            valid=torch.zeros(size, dtype=torch.bool),
            shards=torch.zeros(size, dtype=torch.int64),
            indices=torch.zeros(size, dtype=torch.int64),
            views=torch.zeros(size, dtype=torch.int64),
        )

    def fill(self, part: OpenBatch, row: int, sample: TarSample, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`; the slot then holds nothing but its key."""
        raise NotImplementedError

    def finish(self, part: OpenBatch) -> None:
        """Hook called after all slots are filled; no-op by default."""

    def change(self, image: Image.Image, epoch: int, key: str) -> Image.Image:
        """A further change of a view, before the transform."""
        return image

    def fill_view(self, part: OpenBatch, row: int, sample: TarSample, epoch: int) -> None:
        """Draw a view, and put its pixels into the slot where pixels are read."""
        view = draw(self.cfg.views, self.seed, epoch, sample.key, "view")
        if part.images is not None and self.transform is not None:
            image = decode_image(sample.payloads[sample.image_ext], self.cfg.max_pixels)
            image = self.change(self.cfg.augment(image, sample.key, view), epoch, sample.key)
            part.images[row] = self.transform(image)
        part.views[row] = view
