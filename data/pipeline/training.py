"""Training batches of one rank by step number: what captioned and labelled images share."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch, OpenBatch
from data.config import DataConfig, OnError, check_data
from data.errors import DataError, UsageError, short_list
from data.pipeline.order import MixedOrder, Order, SampleOrder, source_seed
from data.pipeline.slots import Slots
from data.pipeline.streams import StreamParts
from data.pipeline.workers import begin_worker
from data.problems import Problem, SampleError, add_counts, attempt, skip_or_raise
from data.progress import say_once
from data.shards.index import load_summaries
from data.shards.names import expand_shards, is_local
from data.shards.store import SampleStore
from data.shards.tar import DAMAGED, TarSample

# Loader workers hand over parts of at most this many samples, which bounds the memory of a worker's
# queue: 2 parts * 256 samples * 150 kB (224 px, 8 bits) = 77 MB.
PART_SAMPLES = 256

Read = Callable[[int, Sequence[int]], Iterator[TarSample | Problem]]
"""(shard, numbers) -> these samples of it, in turn."""


class TrainPipeline:
    """Batches of one rank, by step number; the same samples for any ranks and loader workers.

    Local shards: a step starts at position step * global_batch_size of one global order, and each
    rank takes its slice; every sample comes once per epoch, and any step can be asked for. As soon
    as one shard is a stream, all are read as streams: resampled, each loader worker of each rank
    with its own randomness, always full batches of good samples, in no promised order.
    """

    def __init__(
        self,
        cfg: DataConfig,
        slots: Slots,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`global_batch_size`: samples of a step, all ranks.

        Raises `UsageError` for impossible values, `SampleError` where `on_error` is "raise" and a
        shard's headers show a problem.
        """
        check_data(cfg)
        if global_batch_size < 1 or global_batch_size % world_size:
            raise UsageError(
                f"global_batch_size {global_batch_size}: allowed are multiples of the number of "
                f"ranks, {world_size}"
            )
        if not 0 <= slots.seed < 2**63:
            raise UsageError(f"seed {slots.seed}: allowed are 0 to 2^63 - 1")
        self._cfg, self._slots, self._seed = cfg, slots, slots.seed
        self._rank, self._world_size = rank, world_size
        self._global_batch_size = global_batch_size
        patterns = [(pattern,) for pattern in cfg.shards] if cfg.weights else [cfg.shards]
        self._sources = [expand_shards(source, cfg.allow_pipe) for source in patterns]
        self.shards: list[str] = expand_shards(cfg.shards, cfg.allow_pipe)
        self.problems: dict[str, int] = {}  # found in the tars' headers, by kind
        self.num_samples: int | None = None  # per epoch; None for streams, which have no epoch
        self._order: Order | None = None
        self._layouts: list[str] = []  # of the shards, as they were counted
        self._fingerprint = "stream"
        if all(is_local(shard) for shard in self.shards):
            self._order = self._build_order()
            self.num_samples = self._order.num_samples
        elif slots.transform is None:
            stream = next(shard for shard in self.shards if not is_local(shard))
            raise UsageError(f"cached features need shards that can seek, {stream!r} is a stream")

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's batches of `num_steps` steps from `start_step` on.

        Raises `SampleError` for a bad sample where `on_error` is "raise", and where a stream gives
        nothing good any more.
        """
        for parts in self.parts(start_step, num_steps):
            yield Batch.join(list(parts))

    def parts(self, start_step: int, num_steps: int) -> Iterator[Iterator[Batch]]:
        """`batches`, each in parts of at most 256 slots, so that a step's pixels need never be in
        memory together. A step's parts are to be read before the next step is asked for."""
        return self._steps(start_step, num_steps, PART_SAMPLES)

    def _steps(
        self, start_step: int, num_steps: int, part_samples: int
    ) -> Iterator[Iterator[Batch]]:
        size = self._global_batch_size // self._world_size
        bounds = [(low, min(low + part_samples, size)) for low in range(0, size, part_samples)]
        parts = iter(self._load(start_step, num_steps, bounds))
        for step in range(start_step, start_step + num_steps):
            yield (_checked(part, step) for part in islice(parts, len(bounds)))

    def fingerprint(self) -> str:
        """Equal where the global order is equal: shards, their sample counts, seed, weights."""
        return self._fingerprint

    def _build_order(self) -> Order:
        cfg = self._cfg
        summaries = load_summaries(self.shards, cfg.index_dir, self._rank, self._world_size)
        lost: list[str] = []
        for shard, summary in zip(self.shards, summaries, strict=True):
            if cfg.on_error == "raise" and summary.first_problem is not None:
                raise SampleError.at(shard, summary.first_problem)
            add_counts(self.problems, summary.problems)
            damage = [kind for kind in DAMAGED if kind in summary.problems]
            if damage or not summary.num_samples:
                lost.append(f"{shard} ({', '.join(damage or summary.problems) or 'no image'})")
        if lost and self._rank == 0:
            say_once(f"warning: damaged or empty shards: {short_list(lost)}")
        if not any(summary.num_samples for summary in summaries):
            kinds = ", ".join(f"{kind} {n:,}" for kind, n in self.problems.items()) or "none"
            raise UsageError(
                f"there is no good sample in {len(summaries)} shards; skipped: {kinds}"
            )
        counts = [summary.num_samples for summary in summaries]
        self._layouts = [summary.layout for summary in summaries]
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

    def _load(
        self, start_step: int, num_steps: int, bounds: list[tuple[int, int]]
    ) -> Iterable[Batch | DataError]:
        """The parts of all steps, one after another."""
        cfg = self._cfg
        parts: Dataset
        spans = None
        if self._order is None:
            parts = StreamParts(
                cfg,
                self._sources,
                self.shards,
                self._slots,
                part_sizes=[high - low for low, high in bounds],
                entropy=(self._seed, self._rank, start_step),
            )
        else:
            keep = 2 * cfg.block_shards * len(self._sources)
            parts = _Parts(self._order, self._read(keep), self._slots, self.shards, cfg.on_error)
            spans = self._spans(start_step, num_steps, bounds)
        return DataLoader(
            parts,
            sampler=spans,
            batch_size=None,
            num_workers=cfg.num_workers,
            worker_init_fn=begin_worker,
            pin_memory=torch.cuda.is_available(),
            # its own, so that making a loader never shifts the training's randomness
            generator=torch.Generator().manual_seed(self._seed),
        )

    def _read(self, keep: int) -> Read:
        """How samples of local shards are read. `keep`: shards whose index stays in memory."""
        store = SampleStore(self.shards, self._cfg.index_dir, keep)
        return partial(_read_stored, store, self._layouts, self._slots.transform is not None)

    def _spans(
        self, start_step: int, num_steps: int, bounds: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Positions [start, stop) of every part of every step."""
        mine = self._rank * self._global_batch_size // self._world_size
        for step in range(start_step, start_step + num_steps):
            base = step * self._global_batch_size + mine
            for low, high in bounds:
                yield base + low, base + high


def _read_stored(
    store: SampleStore, layouts: Sequence[str], pixels: bool, shard: int, numbers: Sequence[int]
) -> Iterator[TarSample | Problem]:
    return store.read(shard, numbers, pixels=pixels, layout=layouts[shard])


def _checked(part: Batch | DataError, step: int) -> Batch:
    if isinstance(part, DataError):
        raise part
    part.step = step
    return part


class _Parts(Dataset):
    """Positions [start, stop) of the global order as a part of a batch."""

    def __init__(
        self,
        order: Order,
        read: Read,
        slots: Slots,
        shards: Sequence[str],
        on_error: OnError,
    ) -> None:
        self._order, self._read, self._slots = order, read, slots
        self._shards, self._on_error = shards, on_error

    def __getitem__(self, span: tuple[int, int]) -> Batch | DataError:
        try:
            return self._part(*span)
        except DataError as error:  # handed over, and raised in the main process
            return error

    def _part(self, start: int, stop: int) -> Batch:
        epochs, shards, indices = self._order.slice(start, stop).T
        part = self._slots.empty(len(shards))
        part.shards, part.indices = torch.tensor(shards), torch.tensor(indices)
        forward = np.lexsort((indices, shards)).tolist()  # each shard is opened once
        for shard, group in groupby(forward, key=lambda row: int(shards[row])):
            rows = list(group)
            found = self._read(shard, indices[rows].tolist())
            for row, sample in zip(rows, found, strict=True):
                problem = self._fill(part, row, int(epochs[row]), sample)
                if problem is not None:
                    skip_or_raise(problem, self._shards[shard], self._on_error, part.errors)
        self._slots.finish(part)
        return part

    def _fill(
        self, part: OpenBatch, row: int, epoch: int, sample: TarSample | Problem
    ) -> Problem | None:
        if isinstance(sample, Problem):
            part.keys[row] = sample.key
            return sample
        return attempt(sample.key, lambda: self._slots.fill(part, row, sample, epoch))
