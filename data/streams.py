"""Streams: shards that cannot seek, read webdataset's way, resampled and shuffled, without end."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.batch import Batch
from data.captions import concept_id, draw_caption, read_captions
from data.errors import UsageError
from data.images import ImageTransform
from data.problems import BadSample, Problem, SampleError, add_counts
from data.samples import OnError, decode_pixels
from data.shards import iter_stream
from data.tar import Located

# Encoded samples that wait to be shuffled, per loader worker and source: about 50 MB.
SHUFFLE_SAMPLES = 500


@dataclass(frozen=True)
class StreamSource:
    """Shards that are sampled with one weight."""

    shards: list[str]
    weight: float


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
        shards: Sequence[str],
        sources: Sequence[StreamSource],
        transform: ImageTransform,
        *,
        part_sizes: Sequence[int],
        entropy: tuple[int, ...],
        on_error: OnError,
        max_pixels: int,
        allow_pipe: bool,
    ) -> None:
        """`shards`: all there are, which numbers them. `part_sizes`: samples per part, in turn.

        `entropy`: what makes this rank's draw its own.

        Raises `UsageError` for weights that cannot work.
        """
        weights = [source.weight for source in sources]
        if not all(0 < weight < float("inf") for weight in weights):
            raise UsageError(f"the weights are {tuple(weights)}, allowed are positive numbers")
        self._shards, self._sources = shards, sources
        self._transform, self._part_sizes = transform, part_sizes
        self._entropy, self._on_error, self._max_pixels = entropy, on_error, max_pixels
        self._allow_pipe = allow_pipe

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
        weights = [source.weight for source in self._sources]
        streams = [
            self._shuffled(source.shards, _seed(*self._entropy, worker, number), errors)
            for number, source in enumerate(self._sources)
        ]
        rng = random.Random(_seed(*self._entropy, worker, len(self._sources)))
        while True:
            yield next(rng.choices(streams, weights)[0])

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
            yield from iter_stream(url, self._allow_pipe)
        except Exception as error:  # whatever a file system may raise
            yield Problem("unreadable", "", f"{type(error).__name__}: {error}")

    def _part(self, samples: Iterator[_Met], size: int, errors: dict[str, int]) -> Batch:
        side = self._transform.image_size
        images = torch.zeros(size, 3, side, side)
        met: list[_Met] = []
        captions: list[str] = []
        concepts: list[int] = []
        refused = 0
        while len(met) < size:
            item = next(samples)
            try:
                texts = read_captions(item.sample.payloads)
                data = item.sample.payloads[item.sample.image_ext]
                images[len(met)] = decode_pixels(data, self._transform, self._max_pixels)
            except BadSample as bad:
                problem = Problem(bad.kind, item.sample.key, bad.cause)
                self._refuse(self._shards[item.shard], problem, errors)
                refused += 1
                if refused > 10_000 + 10 * size:
                    raise SampleError(f"the last {refused} samples were bad: {errors}") from None
                continue
            refused = 0
            # a sample that comes again is a new reading: its captions take turns
            captions.append(draw_caption(texts, self._entropy[0], item.reading, item.sample.key))
            concepts.append(concept_id(texts))
            met.append(item)
        part = Batch(
            step=0,
            keys=[item.sample.key for item in met],
            images=images,
            captions=captions,
            concepts=torch.tensor(concepts, dtype=torch.int64),
            valid=torch.ones(size, dtype=torch.bool),
            shards=torch.tensor([item.shard for item in met], dtype=torch.int64),
            indices=torch.tensor([item.index for item in met], dtype=torch.int64),
            errors=dict(errors),
        )
        errors.clear()
        return part

    def _refuse(self, shard: str, problem: Problem, errors: dict[str, int]) -> None:
        if self._on_error == "raise":
            raise SampleError.at(shard, problem)
        add_counts(errors, {problem.kind: 1})


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
