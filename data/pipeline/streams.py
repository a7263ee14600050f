"""Streams: shards that cannot seek, read webdataset's way, resampled and shuffled, without end."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch.utils.data import IterableDataset, get_worker_info

from data.batch import Batch
from data.config import DataConfig
from data.pipeline.order import derived_seed
from data.pipeline.slots import Slots
from data.problems import BadSample, Problem, SampleError, add_counts
from data.shards.index import iter_stream
from data.shards.tar import Located

# Encoded samples that wait to be shuffled, per loader worker and source: about 50 MB.
SHUFFLE_SAMPLES = 500


@dataclass
class _Met:
    """A sample as it was met: where, and in which of this worker's passes over a shard."""

    shard: int
    index: int
    reading: int
    sample: Located


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
        """`sources`: shards that are sampled with one weight. `shards`: all, which numbers them.

        `part_sizes`: samples per part, in turn. `entropy`: what makes this rank's draw its own.
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
        """Samples of the shards drawn. Gives up when many in a row hold none."""
        numbers = {shard: number for number, shard in enumerate(self._shards)}
        barren = 0
        for reading, url in enumerate(draw["url"] for draw in urls):
            barren += 1
            index = 0
            for item in self._read_shard(url):
                if isinstance(item, Problem):
                    self._refuse(url, item, errors)
                else:
                    barren = 0
                    yield _Met(numbers[url], index, reading, item)
                    index += 1
            if barren > 16 + 4 * num_shards:
                raise SampleError(
                    f"no sample in the last {barren} shards drawn, of {url}: {errors}"
                )

    def _read_shard(self, url: str) -> Iterator[Located | Problem]:
        try:
            yield from iter_stream(url, self._cfg.allow_pipe)
        except Exception as error:  # whatever a file system may raise
            yield Problem("unreadable", "", f"{type(error).__name__}: {error}")

    def _part(self, samples: Iterator[_Met], size: int, errors: dict[str, int]) -> Batch:
        part = self._slots.empty(size)
        row = refused = 0
        while row < size:
            met = next(samples)
            try:
                # a sample that comes again is a new reading: its captions take turns
                self._slots.fill(part, row, met.sample, epoch=met.reading)
            except BadSample as bad:
                problem = Problem(bad.kind, met.sample.key, bad.cause)
                self._refuse(self._shards[met.shard], problem, errors)
                refused += 1
                if refused > 10_000 + 10 * size:
                    raise SampleError(f"the last {refused} samples were bad: {errors}") from None
                continue
            part.shards[row], part.indices[row] = met.shard, met.index
            row += 1
            refused = 0
        self._slots.tokenize(part)
        part.errors.update(errors)
        errors.clear()
        return part

    def _refuse(self, shard: str, problem: Problem, errors: dict[str, int]) -> None:
        if self._cfg.on_error == "raise":
            raise SampleError.at(shard, problem)
        add_counts(errors, {problem.kind: 1})
