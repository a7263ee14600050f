"""Samples by number: random access to local shards, and the slots of a batch that they fill."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from data.batch import Batch
from data.captions import concept_id, draw_caption, read_captions
from data.errors import UsageError
from data.images import ImageTransform, decode_image
from data.problems import Problem
from data.shards import ShardIndex, load_index
from data.tar import Located

OnError = Literal["skip", "raise"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    shards: tuple[str, ...] = ()
    """Tars with KEY.jpg|png|webp and KEY.txt or KEY.json: paths or fsspec URLs; braces, globs."""
    weights: tuple[float, ...] = ()
    """One per entry of `shards`: its share of the samples. Empty: all shards are one source."""
    features: str = ""
    """Folder of cached image features, written when missing. Empty: pixels are read each step."""
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
    max_pixels: int
    seed: int  # of the captions' draw

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
            concepts=torch.zeros(size, dtype=torch.int64),
            valid=torch.zeros(size, dtype=torch.bool),
            shards=torch.zeros(size, dtype=torch.int64),
            indices=torch.zeros(size, dtype=torch.int64),
        )

    def fill(self, part: Batch, row: int, sample: Located, epoch: int) -> None:
        """Make one slot good. Raises `BadSample`, and the slot has its key alone."""
        part.keys[row] = sample.key
        captions = read_captions(sample.payloads)
        if part.images is not None and self.transform is not None:
            image = decode_image(sample.payloads[sample.image_ext], self.max_pixels)
            part.images[row] = self.transform(image)
        part.captions[row] = draw_caption(captions, self.seed, epoch, sample.key)
        part.concepts[row] = concept_id(captions)
        part.valid[row] = True
