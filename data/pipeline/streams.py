"""Shards that cannot seek, read webdataset's way: resampled and shuffled, without end."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch.utils.data import IterableDataset, get_worker_info

from data.batch import Batch
from data.config import DataConfig
from data.pipeline.order import derived_seed
from data.pipeline.slots import Slots
from data.problems import Problem, SampleError, attempt, skip_or_raise
from data.shards.stream import iter_stream
from data.shards.tar import TarSample

# Encoded samples that wait to be shuffled, per loader worker and source: about 50 MB.
SHUFFLE_SAMPLES = 500


@dataclass
class _Met:
    """A sample of a stream, and where it was met."""

    shard: int
    index: int
    reading: int  # number of the shard among those that this worker has drawn
    sample: TarSample


class StreamParts(IterableDataset):
    """An endless supply of parts, all slots good, different in every rank and loader worker."""

    def __init__(
        self,
        cfg: DataConfig,
        sources: Sequence[list[str]],
        shards: Sequence[str],
        slots: Slots,
        *,
        part_sizes: Sequence[int],
        entropy: tuple[int, ...],
    ) -> None:
        """`sources`: per weight, its shards. `shards`: all of them, in the order of their numbers.

        `part_sizes`: samples per part, in turn. `entropy`: the seed of this rank's draws.
        """
        self._cfg, self._sources, self._shards, self._slots = cfg, sources, shards, slots
        self._part_sizes, self._entropy = part_sizes, entropy

    def __iter__(self) -> Iterator[Batch | SampleError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        errors: dict[str, int] = {}
        samples = self._mix(worker, errors)
        # The loader takes one part of each worker in turn, so part k comes from k % num_workers.
        number = worker
        while True:
            size = self._part_sizes[number % len(self._part_sizes)]
            try:
                yield self._part(samples, size, errors)
            except SampleError as error:  # handed over, and raised in the main process
                yield error
                return
            number += num_workers

    def _mix(self, worker: int, errors: dict[str, int]) -> Iterator[_Met]:
        """Samples of all sources, drawn by weight."""
        streams = [
            self._shuffled(source, derived_seed(*self._entropy, worker, number), errors)
            for number, source in enumerate(self._sources)
        ]
        rng = random.Random(derived_seed(*self._entropy, worker, len(self._sources)))
        while True:
            yield next(rng.choices(streams, self._cfg.weights or None)[0])

    def _shuffled(self, shards: list[str], seed: int, errors: dict[str, int]) -> Iterator[_Met]:
        import webdataset as wds  # its import costs seconds, and only streams need it

        pipeline = wds.DataPipeline(
            wds.ResampledShards(shards, seed=seed, worker_seed=lambda: seed, deterministic=True),
            partial(self._read, num_shards=len(shards), errors=errors),
            wds.shuffle(SHUFFLE_SAMPLES, initial=SHUFFLE_SAMPLES // 5, rng=random.Random(seed)),
        )
        return iter(pipeline)

    def _read(
        self,
        urls: Iterator[dict[str, str]],
        num_shards: int,
        errors: dict[str, int],
    ) -> Iterator[_Met]:
        """Samples of the shards drawn. Raises `SampleError` when many in a row hold none."""
        numbers = {shard: number for number, shard in enumerate(self._shards)}
        empty_in_a_row = 0
        for reading, url in enumerate(draw["url"] for draw in urls):
            empty_in_a_row += 1
            index = 0
            for item in self._read_shard(url):
                if isinstance(item, Problem):
                    skip_or_raise(item, url, self._cfg.on_error, errors)
                else:
                    empty_in_a_row = 0
                    yield _Met(numbers[url], index, reading, item)
                    index += 1
            if empty_in_a_row > 16 + 4 * num_shards:
                raise SampleError(
                    f"no sample in the last {empty_in_a_row} shards drawn, of {url}: {errors}"
                )

    def _read_shard(self, url: str) -> Iterator[TarSample | Problem]:
        try:
            yield from iter_stream(url, self._cfg.allow_pipe)
        except Exception as error:  # whatever a file system may raise
            yield Problem("unreadable", "", f"{type(error).__name__}: {error}")

    def _part(self, samples: Iterator[_Met], size: int, errors: dict[str, int]) -> Batch:
        part = self._slots.empty(size)
        row = refused = 0
        while row < size:
            met = next(samples)
            # a sample that comes again is a new reading: its captions take turns
            problem = attempt(
                met.sample.key, partial(self._slots.fill, part, row, met.sample, met.reading)
            )
            if problem is not None:
                skip_or_raise(problem, self._shards[met.shard], self._cfg.on_error, errors)
                refused += 1
                if refused > 10_000 + 10 * size:
                    raise SampleError(f"the last {refused} samples were bad: {errors}")
                continue
            part.shards[row], part.indices[row] = met.shard, met.index
            row += 1
            refused = 0
        self._slots.finish(part)
        part.errors.update(errors)
        errors.clear()
        return part
