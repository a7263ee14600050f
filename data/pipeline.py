"""Shards in, batches out: the same samples in the same order for any ranks and loader workers."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch, EvalBatch
from data.captions import concept_id, draw_caption, read_captions
from data.errors import UsageError
from data.images import ImageTransform
from data.order import MixedOrder, Order, SampleOrder, source_seed
from data.problems import BadSample, Problem, SampleError, add_counts
from data.reader import ShardReader
from data.samples import OnError, SampleStore, check_loading, decode_pixels, raise_first
from data.shards import expand_shards, is_local, load_summaries
from data.streams import StreamParts, StreamSource

__all__ = ["Batch", "DataConfig", "EvalBatch", "SampleError", "ShardReader", "TrainPipeline"]

# Loader workers hand over parts of at most this many samples, which bounds what waits in memory:
# 2 parts * 256 samples * 600 kB (224 px, float32) = 300 MB per worker.
PART_SAMPLES = 256


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
    """Shards shuffled together, each loader worker keeps twice as many open."""
    max_pixels: int = 100_000_000
    """Images of more pixels are not decoded."""
    index_dir: str = ""
    """Folder for shard indices. Empty: beside each shard, or in the user's cache."""


class TrainPipeline:
    """Batches of one rank, by step number.

    Local shards: position = step * global_batch_size in one global order, of which each rank takes
    its slice; every sample comes once per epoch, and any step can be asked for. As soon as one
    shard is a stream, all are read as streams: resampled, each loader worker of each rank with
    its own randomness, always full batches of good samples, no order promised.
    """

    def __init__(
        self,
        cfg: DataConfig,
        transform: ImageTransform | None,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`transform` None: pixels are not read. `global_batch_size`: samples, all ranks.

        Raises `UsageError` for impossible values, `SampleError` where `on_error` is "raise" and a
        shard's headers show a problem.
        """
        check_loading(cfg.num_workers, cfg.max_pixels)
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UsageError(
                f"global_batch_size is {global_batch_size}, allowed are multiples of the number "
                f"of ranks, {world_size}"
            )
        if cfg.weights and len(cfg.weights) != len(cfg.shards):
            raise UsageError(
                f"{len(cfg.weights)} weights were given, allowed are one for each of the "
                f"{len(cfg.shards)} entries of shards, or none"
            )
        self._cfg = cfg
        self._transform = transform
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._global_batch_size = global_batch_size
        self._rank_batch_size = global_batch_size // world_size
        patterns = [(pattern,) for pattern in cfg.shards] if cfg.weights else [cfg.shards]
        if not 0 <= seed < 2**63:
            raise UsageError(f"the seed is {seed}, allowed are 0 to 2^63 - 1")
        self._sources = [expand_shards(source, cfg.allow_pipe) for source in patterns]
        self.shards: list[str] = expand_shards(cfg.shards, cfg.allow_pipe)
        self.problems: dict[str, int] = {}  # found in the tars' headers, by kind
        self.num_samples: int | None = None  # per epoch; None for streams, which have no epoch
        self._order: Order | None = None
        if all(is_local(shard) for shard in self.shards):
            self._order = self._build_order()
            self.num_samples = self._order.num_samples
        elif transform is None:
            raise UsageError(
                f"cached features need shards that can seek, {self._first_stream()!r} is a stream"
            )

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's batches of `num_steps` steps from `start_step` on.

        Raises `SampleError` for a bad sample where `on_error` is "raise", and where a stream gives
        nothing good any more.
        """
        size = self._rank_batch_size
        bounds = [(low, min(low + PART_SAMPLES, size)) for low in range(0, size, PART_SAMPLES)]
        keep = 2 * self._cfg.block_shards * len(self._sources)
        with closing(SampleStore(self.shards, self._cfg.index_dir, keep)) as store:
            parts = iter(self._build_loader(store, start_step, num_steps, bounds))
            for step in range(start_step, start_step + num_steps):
                batch = Batch.join([_checked(part) for part in islice(parts, len(bounds))])
                batch.step = step
                yield batch

    def fingerprint(self) -> str:
        """Equal where the global order is equal: shards, their sample counts, seed, weights."""
        if self._order is None:
            return "stream"
        return self._fingerprint

    def _build_order(self) -> Order:
        cfg = self._cfg
        summaries = load_summaries(self.shards, cfg.index_dir, self._rank, self._world_size)
        if cfg.on_error == "raise":
            raise_first(self.shards, summaries)
        for summary in summaries:
            add_counts(self.problems, summary.problems)
        counts = [summary.num_samples for summary in summaries]
        names = [shard.rsplit("/", 1)[-1] for shard in self.shards]
        described = repr((names, counts, self._seed, cfg.weights, cfg.block_shards))
        self._fingerprint = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()
        if not cfg.weights:
            return SampleOrder(counts, self._seed, cfg.block_shards)
        number_of = {shard: number for number, shard in enumerate(self.shards)}
        numbers = [[number_of[shard] for shard in source] for source in self._sources]
        orders = [
            SampleOrder([counts[n] for n in own], source_seed(self._seed, source), cfg.block_shards)
            for source, own in enumerate(numbers)
        ]
        return MixedOrder(orders, cfg.weights, self._seed, numbers)

    def _build_loader(
        self,
        store: SampleStore,
        start_step: int,
        num_steps: int,
        bounds: list[tuple[int, int]],
    ) -> DataLoader:
        cfg = self._cfg
        if self._order is None:
            assert self._transform is not None
            sources = [
                StreamSource(shards, weight)
                for shards, weight in zip(
                    self._sources, cfg.weights or (1.0,) * len(self._sources), strict=True
                )
            ]
            stream = StreamParts(
                self.shards,
                sources,
                self._transform,
                part_sizes=[high - low for low, high in bounds],
                entropy=(self._seed, self._rank, start_step),
                on_error=cfg.on_error,
                max_pixels=cfg.max_pixels,
                allow_pipe=cfg.allow_pipe,
            )
            return self._loader(stream, None)
        parts = _Parts(self._order, store, self._transform, cfg, self._seed, self.shards)
        first = self._rank * self._rank_batch_size
        spans = _Spans(start_step, num_steps, self._global_batch_size, first, bounds)
        return self._loader(parts, spans)

    def _loader(self, parts: Dataset, spans: "_Spans | None") -> DataLoader:
        return DataLoader(
            parts,
            sampler=spans,
            batch_size=None,
            num_workers=self._cfg.num_workers,
            pin_memory=torch.cuda.is_available(),
            # its own, so that making a loader never shifts the training's randomness
            generator=torch.Generator().manual_seed(self._seed),
        )

    def _first_stream(self) -> str:
        return next(shard for shard in self.shards if not is_local(shard))


def _checked(part: Batch | SampleError) -> Batch:
    if isinstance(part, SampleError):
        raise part
    return part


@dataclass(frozen=True)
class _Spans:
    """Positions [start, stop) of every part of every step, computed as they are asked for."""

    start_step: int
    num_steps: int
    global_batch_size: int
    first: int  # this rank's offset in a global batch
    bounds: list[tuple[int, int]]

    def __len__(self) -> int:
        return self.num_steps * len(self.bounds)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start_step, self.start_step + self.num_steps):
            base = step * self.global_batch_size + self.first
            for low, high in self.bounds:
                yield base + low, base + high


class _Parts(Dataset):
    """Positions [start, stop) of the global order as a part of a batch."""

    def __init__(
        self,
        order: Order,
        store: SampleStore,
        transform: ImageTransform | None,
        cfg: DataConfig,
        seed: int,
        shards: Sequence[str],
    ) -> None:
        self._order, self._store, self._transform = order, store, transform
        self._cfg, self._seed, self._shards = cfg, seed, shards

    def __getitem__(self, span: tuple[int, int]) -> Batch | SampleError:
        places = self._order.slice(*span)
        size = len(places)
        images = None
        if self._transform is not None:
            side = self._transform.image_size
            images = torch.zeros(size, 3, side, side)
        part = Batch(
            step=0,
            keys=[""] * size,
            images=images,
            captions=[""] * size,
            concepts=torch.zeros(size, dtype=torch.int64),
            valid=torch.zeros(size, dtype=torch.bool),
            shards=torch.from_numpy(places[:, 1].copy()),
            indices=torch.from_numpy(places[:, 2].copy()),
        )
        for row, (epoch, shard, index) in enumerate(places.tolist()):
            try:
                self._fill(part, row, epoch, shard, index)
            except BadSample as bad:
                if self._cfg.on_error == "raise":  # handed over, and raised in the main process
                    problem = Problem(bad.kind, part.keys[row], bad.cause)
                    return SampleError.at(self._shards[shard], problem)
                add_counts(part.errors, {bad.kind: 1})
        return part

    def _fill(self, part: Batch, row: int, epoch: int, shard: int, index: int) -> None:
        try:
            key = self._store.index(shard).keys[index]
        except (OSError, IndexError) as error:  # the shard went away or was replaced
            raise BadSample("unreadable", str(error)) from None
        part.keys[row] = key
        captions = read_captions(self._store.texts(shard, index))
        if part.images is not None and self._transform is not None:
            data = self._store.image(shard, index)
            part.images[row] = decode_pixels(data, self._transform, self._cfg.max_pixels)
        part.captions[row] = draw_caption(captions, self._seed, epoch, key)
        part.concepts[row] = concept_id(captions)
        part.valid[row] = True
