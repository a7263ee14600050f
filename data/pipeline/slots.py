"""The slots of a training batch, and the configuration that says what fills them."""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from data.batch import Batch
from data.captions import SampleCaptions, draw
from data.errors import UsageError
from data.images import Augment, decode_image
from data.shards.tar import TarSample
from data.transform import ImageTransform

OnError = Literal["skip", "raise"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    shards: tuple[str, ...] = ()
    """Tars with KEY.jpg|png|webp and KEY.txt or KEY.json: paths or fsspec URLs; braces, globs."""
    weights: tuple[float, ...] = ()
    """One per entry of `shards`: its share of the samples. Empty: all shards are one source."""
    features: str = ""
    """Folder of cached image features and tokens, written where missing. Empty: pixels are read in
    each step."""
    views: int = 1
    """Views of each image: the plain one, and views - 1 augmented ones that stay the same; one is
    drawn per epoch."""
    crop: float = 1.0
    """Augmented views: smallest share of the largest square that a random square keeps."""
    flip: bool = False
    """Augmented views: mirror half of them."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    on_error: OnError = "skip"
    """Bad samples: skip and count them, or raise with shard, key and cause."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` shards run their command."""
    block_shards: int = 16
    """Shards shuffled together, each loader worker keeps the indices of twice as many."""
    max_pixels: int = 100_000_000
    """Images of more pixels are not decoded."""
    index_dir: str = ""
    """Folder for shard indices. Empty: beside each shard, or in the user's cache."""

    @property
    def augment(self) -> Augment:
        """How augmented views are made."""
        return Augment(self.crop, self.flip)


def check_views(cfg: DataConfig) -> None:
    """Raises `UsageError` for values that cannot work."""
    if cfg.views < 1:
        raise UsageError(f"--data.views {cfg.views}: at least 1, the plain view")
    if not 0 < cfg.crop <= 1:
        raise UsageError(f"--data.crop {cfg.crop}: above 0, at most 1")
    augments = cfg.flip or cfg.crop < 1
    if augments != (cfg.views > 1):
        raise UsageError(
            f"--data.views {cfg.views} with --data.crop {cfg.crop} and --data.flip {cfg.flip}: "
            "augmented views need more than one view, and a crop below 1 or the flip"
        )


def check_loading(num_workers: int, max_pixels: int) -> None:
    """Raises `UsageError` for values that cannot work."""
    if num_workers < 0:
        raise UsageError(f"num_workers is {num_workers}, allowed are 0 and more")
    if max_pixels < 1:
        raise UsageError(f"max_pixels is {max_pixels}, allowed are 1 and more")


@dataclass(frozen=True)
class Slots:
    """How samples fill the slots of a training batch; each pipeline has its own `fill`."""

    transform: ImageTransform | None  # None: pixels are not read
    cfg: DataConfig
    seed: int  # of the draws of captions and views

    def empty(self, size: int) -> Batch:
        """A part of a batch whose slots are all bad."""
        images = None
        if self.transform is not None:
            images = torch.zeros(size, 3, self.transform.image_size, self.transform.image_size)
        return Batch(
            step=0,
            keys=[""] * size,
            images=images,
            captions=[""] * size,
            tokens=[[] for _ in range(size)],
            concepts=torch.zeros(size, dtype=torch.int64),
            valid=torch.zeros(size, dtype=torch.bool),
            shards=torch.zeros(size, dtype=torch.int64),
            indices=torch.zeros(size, dtype=torch.int64),
            views=torch.zeros(size, dtype=torch.int64),
        )

    def fill(self, part: Batch, row: int, sample: TarSample | SampleCaptions, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`; the slot then holds nothing but its key."""
        raise NotImplementedError

    def finish(self, part: Batch) -> None:
        """What is done once for all slots of a part, after they are filled: nothing here."""

    def change(self, image: Image.Image, epoch: int, key: str) -> Image.Image:
        """A further change of a view, before the transform."""
        return image

    def fill_view(
        self, part: Batch, row: int, sample: TarSample | SampleCaptions, epoch: int
    ) -> None:
        """Draw a view, and put its pixels into the slot where pixels are read."""
        view = draw(self.cfg.views, self.seed, epoch, sample.key, "view")
        if part.images is not None and self.transform is not None:
            assert isinstance(sample, TarSample)
            image = decode_image(sample.payloads[sample.image_ext], self.cfg.max_pixels)
            image = self.change(self.cfg.augment(image, sample.key, view), epoch, sample.key)
            part.images[row] = self.transform(image)
        part.views[row] = view
