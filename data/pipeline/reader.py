"""Shards read once, in order: what embedding, feature caching and evaluation are given."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch import EvalBatch
from data.captions import read_captions, read_label
from data.config import OnError, check_loading
from data.errors import UsageError
from data.images import ImageTransform, decode_image
from data.pipeline.slots import SampleStore
from data.problems import BadSample, Problem, SampleError, add_counts
from data.shards.index import expand_shards, is_local, iter_stream, load_summaries
from data.shards.tar import Located

Chunk = tuple[int, int, int]  # shard, first sample, the sample after the last
Checked = tuple[EvalBatch | None, list[Problem]]


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
        caption_lines: bool = False,
        share: tuple[int, int] = (0, 1),
        augment: Callable[[Image.Image, str], Image.Image] | None = None,
        on_error: OnError = "skip",
        max_pixels: int = 100_000_000,
        allow_pipe: bool = False,
        index_dir: str = "",
    ) -> None:
        """`shards`: patterns. `transform` None: pixels are not read, images not checked.

        `need_captions`: a sample without a usable caption is bad; else it has no captions.
        `caption_lines`: each line of KEY.txt is a caption. `share`: (rank, ranks); ranks take the
        batches of local shards, and whole streamed shards, in turn: together they give what one
        reader alone gives.
        `augment`: (picture, key) -> the picture that is transformed.
        Raises `UsageError` for impossible values and patterns that match nothing.
        """
        check_loading(num_workers, max_pixels)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, allowed are 1 and more")
        self.shards: list[str] = expand_shards(shards, allow_pipe)
        self.errors: dict[str, int] = {}  # bad samples met by the iteration so far, by kind
        self._rules = _Rules(transform, augment, need_captions, caption_lines, max_pixels)
        self._rank, self._ranks = share
        self._batch_size, self._num_workers = batch_size, num_workers
        self._raise = on_error == "raise"
        self._allow_pipe, self._index_dir = allow_pipe, index_dir

    def __iter__(self) -> Iterator[EvalBatch]:
        self.errors.clear()
        self._turn = 0  # the number of the next batch of a local shard, over all ranks
        first = 0
        while first < len(self.shards):
            local = is_local(self.shards[first])
            stop = first + 1
            while local and stop < len(self.shards) and is_local(self.shards[stop]):
                stop += 1
            for shard, (batch, problems) in (
                self._read_local(first, stop) if local else self._read_stream(first)
            ):
                self._count(shard, problems)
                if batch is not None:
                    yield batch
            first = stop

    def _read_local(self, first: int, stop: int) -> Iterator[tuple[int, Checked]]:
        return iter(
            DataLoader(
                _Chunks(self.shards, self._index_dir, self._rules),
                sampler=self._chunks(first, stop),
                batch_size=None,
                num_workers=self._num_workers,
                generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
            )
        )

    def _chunks(self, first: int, stop: int) -> Iterator[Chunk]:
        """A shard's index is looked up, and its headers' problems counted, when its turn comes."""
        for shard in range(first, stop):
            (summary,) = load_summaries([self.shards[shard]], self._index_dir)
            if self._raise and summary.first_problem is not None:
                raise SampleError.at(self.shards[shard], summary.first_problem)
            if shard % self._ranks == self._rank:
                add_counts(self.errors, summary.problems)
            for start in range(0, summary.num_samples, self._batch_size):
                if self._turn % self._ranks == self._rank:
                    yield shard, start, min(start + self._batch_size, summary.num_samples)
                self._turn += 1

    def _read_stream(self, shard: int) -> Iterator[tuple[int, Checked]]:
        if shard % self._ranks != self._rank:
            return
        samples = enumerate(self._located(shard))
        with ThreadPoolExecutor(max(self._num_workers, 1)) as pool:
            while chunk := list(islice(samples, self._batch_size)):
                yield shard, _assemble(shard, pool.map(self._rules.check, chunk))

    def _located(self, shard: int) -> Iterator[Located]:
        for item in iter_stream(self.shards[shard], self._allow_pipe):
            if isinstance(item, Problem):
                self._count(shard, [item])
            else:
                yield item

    def _count(self, shard: int, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if self._raise:
                raise SampleError.at(self.shards[shard], problem)
            add_counts(self.errors, {problem.kind: 1})


@dataclass(frozen=True)
class _Good:
    """One checked sample."""

    index: int
    key: str
    span: tuple[int, int]  # of the image: offset, size
    captions: tuple[str, ...]
    label: int
    pixels: Float[Tensor, "3 s s"] | None


@dataclass(frozen=True)
class _Rules:
    """What makes a sample good."""

    transform: ImageTransform | None
    augment: Callable[[Image.Image, str], Image.Image] | None
    need_captions: bool
    caption_lines: bool
    max_pixels: int

    def check(self, numbered: tuple[int, Located]) -> tuple[_Good | None, Problem | None]:
        index, found = numbered
        problem = None
        try:
            captions = self._captions(found)
            pixels = None
            if self.transform is not None:
                image = decode_image(found.payloads[found.image_ext], self.max_pixels)
                if self.augment is not None:
                    image = self.augment(image, found.key)
                pixels = self.transform(image)
        except BadSample as bad:
            return None, Problem(bad.kind, found.key, bad.cause)
        try:
            label = read_label(found.payloads)
        except BadSample as bad:  # costs the label, not the picture
            label, problem = -1, Problem(bad.kind, found.key, bad.cause)
        span = found.spans[found.image_ext]
        return _Good(index, found.key, span, captions, label, pixels), problem

    def _captions(self, found: Located) -> tuple[str, ...]:
        try:
            return read_captions(found.payloads, self.caption_lines)
        except BadSample:
            if self.need_captions:
                raise
            return ()


class _Chunks(Dataset):
    """Chunks of local shards, checked."""

    def __init__(self, shards: Sequence[str], index_dir: str, rules: _Rules) -> None:
        self._shards, self._rules = shards, rules
        self._store = SampleStore(shards, index_dir, keep=2)

    def __getitem__(self, chunk: Chunk) -> tuple[int, Checked]:
        shard, start, stop = chunk
        numbers = range(start, stop)
        checked = []
        pixels = self._rules.transform is not None
        found = self._store.read(shard, numbers, pixels=pixels)
        for number, sample in zip(numbers, found, strict=True):
            if isinstance(sample, Problem):  # the shard was there when its chunks were counted
                raise SampleError.at(self._shards[shard], sample)
            checked.append(self._rules.check((number, sample)))
        return shard, _assemble(shard, checked)


def _assemble(shard: int, checked: Iterable[tuple[_Good | None, Problem | None]]) -> Checked:
    results = list(checked)
    problems = [problem for _, problem in results if problem is not None]
    good = [sample for sample, _ in results if sample is not None]
    if not good:
        return None, problems
    pixels = [sample.pixels for sample in good if sample.pixels is not None]
    batch = EvalBatch(
        keys=[sample.key for sample in good],
        images=torch.stack(pixels) if pixels else None,
        captions=[sample.captions for sample in good],
        labels=torch.tensor([sample.label for sample in good]),
        shard=shard,
        indices=torch.tensor([sample.index for sample in good]),
        offsets=torch.tensor([sample.span[0] for sample in good]),
        sizes=torch.tensor([sample.span[1] for sample in good]),
    )
    return batch, problems
