"""Shards read once, in order, for embedding, feature caching and evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import EvalBatch, Pixels, batch_pixels
from data.captions import read_captions, read_label
from data.config import MAX_PIXELS, NUM_WORKERS, OnError, check_loading
from data.errors import DataError, UsageError
from data.pipeline.workers import begin_worker
from data.problems import BadSample, Problem, SampleError, add_counts, attempt, skip_or_raise
from data.shards.identity import Identity, stamp
from data.shards.index import load_summaries
from data.shards.location import image_digest
from data.shards.names import expand_shards, is_local
from data.shards.store import SampleStore
from data.shards.stream import iter_stream
from data.shards.tar import TarSample
from data.transform import AnyImage, Cuts, ImageTransform

Span = tuple[int, str, int, int, bool]
"""Consecutive samples of a shard: its number, its layout, the first sample, the one after the last,
and whether the shard has no more."""
Checked = tuple[EvalBatch | None, list[Problem]]
"""The good samples among some, and what is wrong with the others."""
Read = tuple[int, Checked, bool]
"""The number of a shard, samples of it, and whether it has no more."""


class ShardReader:
    """Good samples of shards in shard order, batch by batch, no batch across two shards.

    Local shards are read by `num_workers` processes; a stream is read by this process and decoded
    by `num_workers` threads. A shard without a good sample gives no batch. Errors of a network or a
    disk are raised, never counted.
    """

    def __init__(
        self,
        shards: Sequence[str],
        transform: ImageTransform | None,
        *,
        batch_size: int = 64,
        num_workers: int = NUM_WORKERS,
        need_captions: bool = False,
        need_labels: bool = False,
        caption_lines: bool = False,
        share: tuple[int, int] = (0, 1),
        augment: Callable[[AnyImage, str], AnyImage] | None = None,
        on_error: OnError = "skip",
        max_pixels: int = MAX_PIXELS,
        allow_pipe: bool = False,
        index_dir: str = "",
        digests: bool = False,
        cuts: Cuts | None = None,
    ) -> None:
        """`shards`: patterns. `transform` None: pixels are not read, images not checked.

        `need_captions`: a sample without a usable caption is bad; else it has no captions.
        `need_labels`: so is one whose label is no class number; else it has label -1.
        `caption_lines`: each line of KEY.txt is a caption. `share`: (rank, ranks); ranks take the
        batches of local shards, and whole streamed shards, in turn, so that together they give what
        one reader gives. `augment`: (what `transform.decode` gives, key) -> the image that is
        transformed. `digests`: of the images' bytes, in the batches. `cuts`: batches hold `shaped`
        images by these, not squares.
        Raises `UsageError` for impossible values and patterns that match nothing.
        """
        check_loading(num_workers, max_pixels)
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size}: at least 1")
        self.shards: list[str] = expand_shards(shards, allow_pipe)
        self.errors: dict[str, int] = {}  # bad samples met by the iteration so far, by kind
        self.shard_errors: dict[int, dict[str, int]] = {}  # those of each shard, by its number
        self.stamps: dict[int, Identity] = {}  # of each shard when its reading began
        self._rules = _Rules(
            transform, augment, need_captions, need_labels, caption_lines, max_pixels, digests, cuts
        )
        self._rank, self._ranks = share
        self._batch_size, self._num_workers = batch_size, num_workers
        self._on_error: OnError = on_error
        self._allow_pipe, self._index_dir = allow_pipe, index_dir

    def __iter__(self) -> Iterator[EvalBatch]:
        return (batch for _, batch, _ in self.steps() if batch is not None)

    def steps(self) -> Iterator[tuple[int, EvalBatch | None, bool]]:
        """The number of a shard, a batch of it, and whether it has no more. A shard's last step may
        have no batch; it comes even where the shard holds no sample. For a reader without ranks.
        """
        self.errors.clear()
        self.shard_errors.clear()
        self._turn = 0  # the number of the next batch of a local shard, over all ranks
        first = 0
        while first < len(self.shards):
            local = is_local(self.shards[first])
            stop = first + 1
            while local and stop < len(self.shards) and is_local(self.shards[stop]):
                stop += 1
            for shard, (batch, problems), last in (
                self._read_local(first, stop) if local else self._read_stream(first)
            ):
                self._count(shard, problems)
                yield shard, batch, last
            first = stop

    def _read_local(self, first: int, stop: int) -> Iterator[Read]:
        loader = DataLoader(
            _LocalBatches(self.shards, self._index_dir, self._rules),
            sampler=self._spans(first, stop),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin_worker,
            generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
        )
        for found in loader:
            if isinstance(found, DataError):
                raise found
            yield found

    def _spans(self, first: int, stop: int) -> Iterator[Span]:
        """The batches of local shards. A shard's index is read, and the problems of its headers are
        counted, when its turn comes."""
        for shard in range(first, stop):
            name, rank = self.shards[shard], self._rank
            self._stamp(shard)
            (summary,) = load_summaries([name], self._index_dir)
            if self._on_error == "raise" and summary.first_problem is not None:
                raise SampleError.at(name, summary.first_problem)
            if shard % self._ranks == rank:
                self._add(shard, summary.problems)
                if not summary.num_samples:
                    yield shard, summary.layout, 0, 0, True
            for start in range(0, summary.num_samples, self._batch_size):
                end = min(start + self._batch_size, summary.num_samples)
                if self._turn % self._ranks == rank:
                    yield shard, summary.layout, start, end, end == summary.num_samples
                self._turn += 1

    def _stamp(self, shard: int) -> None:
        with suppress(OSError):  # reading it will say more
            self.stamps[shard] = stamp(self.shards[shard])

    def _read_stream(self, shard: int) -> Iterator[Read]:
        if shard % self._ranks != self._rank:
            return
        self._stamp(shard)
        samples = enumerate(self._stream(shard))
        with ThreadPoolExecutor(max(self._num_workers, 1)) as pool:
            while batch := list(islice(samples, self._batch_size)):
                yield shard, _assemble(shard, pool.map(self._rules.check, batch)), False
        yield shard, (None, []), True

    def _stream(self, shard: int) -> Iterator[TarSample]:
        for item in iter_stream(self.shards[shard], self._allow_pipe):
            if isinstance(item, Problem):
                self._count(shard, [item])
            else:
                yield item

    def _count(self, shard: int, problems: Sequence[Problem]) -> None:
        for problem in problems:
            counts: dict[str, int] = {}
            skip_or_raise(problem, self.shards[shard], self._on_error, counts)
            self._add(shard, counts)

    def _add(self, shard: int, counts: Mapping[str, int]) -> None:
        add_counts(self.errors, counts)
        add_counts(self.shard_errors.setdefault(shard, {}), counts)


@dataclass(frozen=True)
class _Good:
    """One checked sample."""

    index: int
    key: str
    span: tuple[int, int]  # of the image: offset, size
    captions: tuple[str, ...]
    label: int
    pixels: Pixels | None
    digest: int  # of the image's bytes, 0 where not asked


@dataclass(frozen=True)
class _Rules:
    """What makes a sample good."""

    transform: ImageTransform | None
    augment: Callable[[AnyImage, str], AnyImage] | None
    need_captions: bool
    need_labels: bool
    caption_lines: bool
    max_pixels: int
    digests: bool
    cuts: Cuts | None

    def check(self, numbered: tuple[int, TarSample]) -> tuple[_Good | None, Problem | None]:
        """The sample where it is good, and what is wrong with it or its label."""
        index, sample = numbered
        content = attempt(sample.key, lambda: (self._captions(sample), self._pixels(sample)))
        if isinstance(content, Problem):
            return None, content
        captions, pixels = content
        label, problem = -1, None
        read = attempt(sample.key, lambda: read_label(sample.payloads))
        if isinstance(read, Problem):  # costs the label, and the image only where both are needed
            if self.need_labels:
                return None, read
            problem = read
        else:
            label = read
        span = sample.spans[sample.image_ext]
        digest = image_digest(sample.payloads[sample.image_ext]) if self.digests else 0
        return _Good(index, sample.key, span, captions, label, pixels, digest), problem

    def _captions(self, sample: TarSample) -> tuple[str, ...]:
        try:
            return read_captions(sample.payloads, self.caption_lines)
        except BadSample:
            if self.need_captions:
                raise
            return ()

    def _pixels(self, sample: TarSample) -> Pixels | None:
        if self.transform is None:
            return None
        image = self.transform.decode(sample.payloads[sample.image_ext], self.max_pixels)
        if self.augment is not None:
            image = self.augment(image, sample.key)
        return self.transform.pixels(image, self.cuts)


class _LocalBatches(Dataset):
    """Samples of local shards, checked and put together; read by loader processes."""

    def __init__(self, shards: Sequence[str], index_dir: str, rules: _Rules) -> None:
        self._shards, self._rules = shards, rules
        self._store = SampleStore(shards, index_dir, keep=2)

    def __getitem__(self, span: Span) -> Read | DataError:
        shard, layout, start, stop, last = span
        numbers = range(start, stop)
        checked = []
        pixels = self._rules.transform is not None
        try:
            found = self._store.read(shard, numbers, pixels=pixels, layout=layout)
            for number, sample in zip(numbers, found, strict=True):
                if isinstance(sample, Problem):  # it was readable when its samples were counted
                    return SampleError.at(self._shards[shard], sample)
                checked.append(self._rules.check((number, sample)))
        except DataError as error:  # handed over, and raised in the main process
            return error
        return shard, _assemble(shard, checked), last


def _assemble(shard: int, checked: Iterable[tuple[_Good | None, Problem | None]]) -> Checked:
    results = list(checked)
    problems = [problem for _, problem in results if problem is not None]
    good = [sample for sample, _ in results if sample is not None]
    if not good:
        return None, problems
    pixels = [sample.pixels for sample in good if sample.pixels is not None]
    images, shaped = batch_pixels(pixels)
    batch = EvalBatch(
        keys=[sample.key for sample in good],
        images=images,
        captions=[sample.captions for sample in good],
        labels=torch.tensor([sample.label for sample in good]),
        shard=shard,
        indices=torch.tensor([sample.index for sample in good]),
        offsets=torch.tensor([sample.span[0] for sample in good]),
        sizes=torch.tensor([sample.span[1] for sample in good]),
        digests=torch.tensor([s.digest for s in good]) if good[0].digest else None,
        shaped=shaped,
    )
    return batch, problems
