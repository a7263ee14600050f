"""Samples by number: random access to local shards, and the slots of a batch that they fill."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from data.batch import Batch
from data.captions import Texts, Tokenizer, draw
from data.config import DataConfig
from data.images import ImageTransform, decode_image
from data.problems import Problem
from data.shards.index import ShardIndex, load_index
from data.shards.tar import Located


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
