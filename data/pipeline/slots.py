"""Samples by number: random access to local shards, and the slots of a batch that they fill."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from data.batch import Batch
from data.captions import Texts, Tokenizer, draw
from data.errors import UsageError
from data.images import Augment, ImageTransform, decode_image
from data.problems import Problem
from data.shards.index import ShardIndex, load_index
from data.shards.tar import Located

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


class SampleStore:
    """Samples of local shards by (shard, sample) number, with the last few indices in memory."""

    def __init__(self, shards: Sequence[str], index_dir: str, keep: int) -> None:
        """`keep`: how many indices stay in memory."""
        self._arguments = shards, index_dir, keep
        self._index: Callable[[int], ShardIndex] = lru_cache(keep)(
            lambda shard: load_index(shards[shard], index_dir)
        )

    def __reduce__(self) -> tuple[object, ...]:  # loader workers start with an empty cache
        return SampleStore, self._arguments

    def read(
        self, shard: int, numbers: Sequence[int], *, pixels: bool
    ) -> Iterator[Located | Problem]:
        """These samples of one shard, in turn; the problem "unreadable" for each that is not there.

        The file is open no longer than this runs, so that nobody has to close it. `pixels`: read
        the images' bytes too.
        """
        try:
            index = self._index(shard)
            file = open(index.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:  # the shard went away
            yield from [Problem("unreadable", "", str(error))] * len(numbers)
            return
        with file:
            for number in numbers:
                try:
                    yield index.read(file, number, pixels=pixels)
                except (OSError, EOFError, IndexError) as error:  # or was replaced
                    key = index.keys[number] if number < len(index) else ""
                    yield Problem("unreadable", key, str(error))


@dataclass(frozen=True)
class Slots:
    """How samples become the slots of a training batch."""

    transform: ImageTransform | None  # None: pixels are not read
    tokenizer: Tokenizer | None  # None: captions stay strings
    cfg: DataConfig
    seed: int  # of the draw of captions and views

    def empty(self, size: int) -> Batch:
        """All slots bad."""
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

    def fill(self, part: Batch, row: int, sample: Located | Texts, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`, and the slot has its key alone."""
        part.keys[row] = sample.key
        texts = sample if isinstance(sample, Texts) else Texts.of(sample.key, sample.payloads)
        view = draw(self.cfg.views, self.seed, epoch, sample.key, "view")
        if part.images is not None and self.transform is not None:
            assert isinstance(sample, Located)
            image = decode_image(sample.payloads[sample.image_ext], self.cfg.max_pixels)
            part.images[row] = self.transform(self.cfg.augment(image, sample.key, view))
        number = draw(len(texts.captions), self.seed, epoch, sample.key)
        part.captions[row] = texts.captions[number]
        if texts.tokens:
            part.tokens[row] = texts.tokens[number]
        part.concepts[row] = texts.concept
        part.views[row] = view
        part.valid[row] = True

    def tokenize(self, part: Batch) -> None:
        """The token ids of the drawn captions, where the samples did not bring them."""
        rows = [row for row, tokens in enumerate(part.tokens) if part.valid[row] and not tokens]
        if self.tokenizer is not None and rows:
            ids = self.tokenizer([part.captions[row] for row in rows])
            for row, tokens in zip(rows, ids, strict=True):
                part.tokens[row] = tokens
