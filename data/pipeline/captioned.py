"""Batches of captioned images, for the training of a text tower."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.batch import Batch, OpenBatch
from data.cache.captions import CaptionCache
from data.cache.text_vectors import TextVectorCache
from data.captions import SampleCaptions, Tokenizer
from data.config import DataConfig
from data.errors import DataError
from data.pipeline.columns import ColumnGather
from data.pipeline.draw import draw, draw_several
from data.pipeline.slots import Slots
from data.pipeline.training import TrainPipeline
from data.shards.tar import TarSample
from data.token_ids import TokenIds
from data.transform import ImageTransform


@dataclass(frozen=True)
class CaptionedSlots(Slots):
    """Slots that hold captions of each sample, and its pixels where they are read."""

    tokenizer: Tokenizer | None = None  # None: captions stay strings

    def fill(self, part: OpenBatch, row: int, sample: TarSample, epoch: int) -> None:
        part.keys[row] = sample.key
        own = SampleCaptions.of(sample.key, sample.payloads)
        self.fill_view(part, row, sample, epoch)
        count, several = len(own.captions), self.cfg.captions_per_image
        part.captions[row] = own.captions[draw(count, self.seed, epoch, own.key)]
        if several > 1:
            counts, epochs = np.array([count]), np.array([epoch])
            drawn = draw_several(counts, several, self.seed, epochs, lambda _: [own.key.encode()])
            part.further[row] = [own.captions[number] for number in drawn[0, 1:count]]
        part.concepts[row] = own.concept
        part.valid[row] = True

    def finish(self, part: OpenBatch) -> None:
        """Tokenise the drawn captions; where several are drawn, spread them first."""
        if self.cfg.captions_per_image > 1:
            self._spread(part)
        if self.tokenizer is None:
            return
        good = part.valid[torch.from_numpy(part.caption_slots)].tolist()
        texts = [text for text, valid in zip(part.captions, good, strict=True) if valid]
        ids = iter(self.tokenizer(texts) if texts else [])
        part.tokens = TokenIds.of([next(ids) if valid else [] for valid in good])

    def _spread(self, part: OpenBatch) -> None:
        """As many captions as were drawn, and none of bad slots."""
        good = part.valid.nonzero()[:, 0].tolist()
        drawn = {row: [part.captions[row], *part.further[row]] for row in good}
        part.captions = [caption for row in good for caption in drawn[row]]
        part.slots = np.repeat(np.array(good, dtype=np.int64), [len(drawn[row]) for row in good])
        part.further = {}


class CaptionedPipeline(TrainPipeline):
    """A `TrainPipeline` of samples with an image and a caption; others are bad."""

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform | None,
        *,
        tokenizer: Tokenizer | None = None,
        vectors: TextVectorCache | None = None,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`transform` None: pixels are not read. `tokenizer` None: captions stay strings.

        With `cfg.features` and a tokenizer no shard is read, captions come from the `CaptionCache`
        there, without loader processes, and their vectors where `vectors` is given.
        The rest, and what is raised: as `TrainPipeline`.
        """
        slots = CaptionedSlots(transform, cfg, seed, tokenizer)
        super().__init__(
            cfg, slots, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )
        self._gather: ColumnGather | None = None
        if cfg.features and tokenizer is not None and self._order is not None:
            keep = 2 * cfg.block_shards * len(self._sources)
            cache = CaptionCache(cfg.features, self.shards, tokenizer, cfg.index_dir, keep)
            self._gather = ColumnGather(self._order, cache, self.shards, cfg, seed, vectors)

    def steps(self, start_step: int, num_steps: int) -> Iterator[Iterator[Batch]]:
        """`parts`, but whole batches where they come from the cache: these cost less at once."""
        if self._gather is None:
            return self.parts(start_step, num_steps)
        return self._steps(start_step, num_steps, self._global_batch_size // self._world_size)

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        for parts in self.steps(start_step, num_steps):
            yield Batch.join(list(parts))

    def _load(
        self, start_step: int, num_steps: int, bounds: list[tuple[int, int]]
    ) -> Iterable[Batch | DataError]:
        if self._gather is None:
            return super()._load(start_step, num_steps, bounds)
        gather = self._gather
        return (gather(*span) for span in self._spans(start_step, num_steps, bounds))
