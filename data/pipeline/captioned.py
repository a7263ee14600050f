"""Batches of captioned images, for the training of a text tower."""

from dataclasses import dataclass, field

from data.batch import Batch
from data.cache.captions import CaptionCache
from data.captions import SampleCaptions, Tokenizer
from data.config import DataConfig
from data.pipeline.draw import draw
from data.pipeline.slots import Sample, Slots
from data.pipeline.training import Read, TrainPipeline
from data.shards.tar import TarSample
from data.token_ids import TokenIds
from data.transform import ImageTransform


@dataclass(frozen=True)
class CaptionedSlots(Slots):
    """Slots that hold one caption of each sample, and its pixels where they are read."""

    tokenizer: Tokenizer | None = None  # None: captions stay strings
    _tokens: dict[int, list[int]] = field(default_factory=dict)  # of the part's slots, as filled

    def fill(self, part: Batch, row: int, sample: Sample, epoch: int) -> None:
        part.keys[row] = sample.key
        own = sample
        if isinstance(own, TarSample):
            own = SampleCaptions.of(own.key, own.payloads)
        self.fill_view(part, row, sample, epoch)
        number = draw(len(own.captions), self.seed, epoch, own.key)
        part.captions[row] = own.captions[number]
        if own.tokens:
            self._tokens[row] = own.tokens[number]
        part.concepts[row] = own.concept
        part.valid[row] = True

    def finish(self, part: Batch) -> None:
        """Tokenise the drawn captions where the samples did not bring their token ids."""
        rows = [row for row in part.valid.nonzero()[:, 0].tolist() if row not in self._tokens]
        if self.tokenizer is not None and rows:
            ids = self.tokenizer([part.captions[row] for row in rows])
            self._tokens.update(zip(rows, ids, strict=True))
        part.tokens = TokenIds.of([self._tokens.get(row, []) for row in range(len(part))])
        self._tokens.clear()


class CaptionedPipeline(TrainPipeline):
    """A `TrainPipeline` of samples with an image and a caption; others are bad."""

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform | None,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`transform` None: pixels are not read. `tokenizer` None: captions stay strings.

        With `cfg.features` and a tokenizer no shard is read, captions come from the `CaptionCache`
        there. The rest, and what is raised: as `TrainPipeline`.
        """
        self._tokenizer = tokenizer
        slots = CaptionedSlots(transform, cfg, seed, tokenizer)
        super().__init__(
            cfg, slots, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )

    def _read(self, keep: int) -> Read:
        cfg = self._cfg
        if cfg.features and self._tokenizer is not None:
            cache = CaptionCache(cfg.features, self.shards, self._tokenizer, cfg.index_dir, keep)
            return cache.read
        return super()._read(keep)
