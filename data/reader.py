"""Shards read once, in order: what embedding, feature caching and evaluation are given."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch import EvalBatch
from data.errors import UsageError
from data.images import ImageTransform
from data.problems import BadSample, Problem, SampleError, add_counts
from data.samples import (
    OnError,
    SampleStore,
    check_loading,
    decode_pixels,
    find_captions,
    read_label,
)
from data.shards import expand_shards, is_local, iter_stream, load_summaries
from data.tar import Located


class ShardReader:
    """Good samples of shards in shard order, batch by batch, no batch across two shards.

    Local shards are read by `num_workers` processes, others forward by one reader and
    `num_workers` decoding threads. A shard without a good sample gives no batch. Whatever keeps a
    shard from being read to its end (a network, a disk) is raised, never counted.
    """

    def __init__(
        self,
        shards: Sequence[str],
        transform: ImageTransform | None,
        *,
        batch_size: int = 64,
        num_workers: int = 2,
        need_captions: bool = False,
        on_error: OnError = "skip",
        max_pixels: int = 100_000_000,
        allow_pipe: bool = False,
        index_dir: str = "",
    ) -> None:
        """`shards`: patterns. `transform` None: pixels are not read, images not checked.

        `need_captions`: a sample without a usable caption is bad; else it has no captions.
        Raises `UsageError` for impossible values and patterns that match nothing.
        """
        check_loading(num_workers, max_pixels)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, allowed are 1 and more")
        self.shards: list[str] = expand_shards(shards, allow_pipe)
        self.errors: dict[str, int] = {}  # bad samples met by the iteration so far, by kind
        self._rules = _Rules(transform, need_captions, max_pixels)
        self._batch_size, self._num_workers = batch_size, num_workers
        self._raise = on_error == "raise"
        self._allow_pipe, self._index_dir = allow_pipe, index_dir

    def __iter__(self) -> Iterator[EvalBatch]:
        self.errors.clear()
        first = 0
        while first < len(self.shards):
            local = is_local(self.shards[first])
            stop = first + 1
            while local and stop < len(self.shards) and is_local(self.shards[stop]):
                stop += 1
            yield from self._iter_local(first, stop) if local else self._iter_remote(first)
            first = stop

    def _iter_local(self, first: int, stop: int) -> Iterator[EvalBatch]:
        with closing(SampleStore(self.shards, self._index_dir, keep=2)) as store:
            loader = DataLoader(
                _Chunks(store, self._rules),
                sampler=_ChunkSampler(self, first, stop),
                batch_size=None,
                num_workers=self._num_workers,
                generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
            )
            for shard, batch, problems in loader:
                self._count(shard, problems)
                if batch is not None:
                    yield batch

    def _iter_remote(self, shard: int) -> Iterator[EvalBatch]:
        samples = self._located(shard)
        with ThreadPoolExecutor(max(self._num_workers, 1)) as pool:
            while chunk := list(islice(samples, self._batch_size)):
                checked = list(pool.map(self._rules.check, (found for _, found in chunk)))
                rows = [(index, *found) for (index, _), found in zip(chunk, checked, strict=True)]
                batch, problems = _assemble(shard, rows)
                self._count(shard, problems)
                if batch is not None:
                    yield batch

    def _located(self, shard: int) -> Iterator[tuple[int, Located]]:
        index = 0
        for item in iter_stream(self.shards[shard], self._allow_pipe):
            if isinstance(item, Problem):
                self._count(shard, [item])
            else:
                yield index, item
                index += 1

    def _count(self, shard: int, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if self._raise:
                raise SampleError.at(self.shards[shard], problem)
            add_counts(self.errors, {problem.kind: 1})

    def _open_local(self, shard: int) -> int:
        """Number of samples of a shard, whose headers' problems are counted here."""
        (summary,) = load_summaries([self.shards[shard]], self._index_dir)
        if self._raise and summary.first_problem is not None:
            raise SampleError.at(self.shards[shard], summary.first_problem)
        add_counts(self.errors, summary.problems)
        return summary.num_samples


class _ChunkSampler:
    """(shard, start, stop) of every chunk; a shard's index is looked up when its turn comes."""

    def __init__(self, reader: ShardReader, first: int, stop: int) -> None:
        self._reader, self._first, self._stop = reader, first, stop

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        size = self._reader._batch_size
        for shard in range(self._first, self._stop):
            count = self._reader._open_local(shard)
            for start in range(0, count, size):
                yield shard, start, min(start + size, count)


@dataclass(frozen=True)
class _Good:
    """One checked sample."""

    captions: tuple[str, ...]
    label: int
    pixels: Float[Tensor, "3 s s"] | None


@dataclass(frozen=True)
class _Rules:
    """What makes a sample good."""

    transform: ImageTransform | None
    need_captions: bool
    max_pixels: int

    def check(self, found: Located) -> "tuple[Located, _Good | None, list[Problem]]":
        problems: list[Problem] = []
        try:
            captions = find_captions(found.payloads, self.need_captions)
            pixels = None
            if self.transform is not None:
                data = found.payloads[found.image_ext]
                pixels = decode_pixels(data, self.transform, self.max_pixels)
        except BadSample as bad:
            return found, None, [Problem(bad.kind, found.key, bad.cause)]
        label = -1
        try:
            label = read_label(found.payloads)
        except BadSample as bad:  # costs the label, not the picture
            problems.append(Problem(bad.kind, found.key, bad.cause))
        return found, _Good(captions, label, pixels), problems


class _Chunks(Dataset):
    """Samples [start, stop) of a local shard, checked."""

    def __init__(self, store: SampleStore, rules: _Rules) -> None:
        self._store, self._rules = store, rules

    def __getitem__(
        self, chunk: tuple[int, int, int]
    ) -> tuple[int, EvalBatch | None, list[Problem]]:
        shard, start, stop = chunk
        table = self._store.index(shard)
        rows = []
        for index in range(start, stop):
            ext = table.image_exts[index]
            payloads = self._store.texts(shard, index)
            if self._rules.transform is not None:
                payloads[ext] = self._store.image(shard, index)
            span = int(table.image_offset[index]), int(table.image_size[index])
            found = Located(table.keys[index], ext, {ext: span}, payloads)
            rows.append((index, *self._rules.check(found)))
        return shard, *_assemble(shard, rows)


def _assemble(
    shard: int, rows: "Sequence[tuple[int, Located, _Good | None, list[Problem]]]"
) -> tuple[EvalBatch | None, list[Problem]]:
    problems = [problem for row in rows for problem in row[3]]
    good = [(index, found, sample) for index, found, sample, _ in rows if sample is not None]
    if not good:
        return None, problems
    spans = [found.spans[found.image_ext] for _, found, _ in good]
    pixels = [sample.pixels for _, _, sample in good if sample.pixels is not None]
    batch = EvalBatch(
        keys=[found.key for _, found, _ in good],
        images=torch.stack(pixels) if pixels else None,
        captions=[sample.captions for _, _, sample in good],
        labels=torch.tensor([sample.label for _, _, sample in good]),
        shard=shard,
        indices=torch.tensor([index for index, _, _ in good]),
        offsets=torch.tensor([offset for offset, _ in spans]),
        sizes=torch.tensor([size for _, size in spans]),
    )
    return batch, problems
