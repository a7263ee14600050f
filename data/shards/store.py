"""Samples of local shards by number, read at random."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from data.errors import DataError
from data.problems import Problem
from data.shards.index import ShardIndex, load_index
from data.shards.tar import TarSample

_REPLACED = "was replaced while it was being read; start again, to read what it holds now"


class SampleStore:
    """Samples of local shards by (shard, sample) number, with the last few indices in memory."""

    def __init__(self, shards: Sequence[str], index_dir: str, keep: int) -> None:
        """`keep`: indices that stay in memory."""
        self._arguments = shards, index_dir, keep
        self._index: Callable[[int, int], ShardIndex] = lru_cache(keep)(
            lambda shard, modified: load_index(shards[shard], index_dir)
        )

    def __reduce__(self) -> tuple[object, ...]:  # loader workers start with an empty cache
        return SampleStore, self._arguments

    def read(
        self, shard: int, numbers: Sequence[int], *, pixels: bool, layout: str
    ) -> Iterator[TarSample | Problem]:
        """These samples of one shard, in turn; the problem "unreadable" for each that is not there.

        `pixels`: read the images' bytes too. `layout`: of the shard, as `load_summaries` found it
        when its samples were counted. Raises `DataError` where the shard was replaced since by one
        of other members, or is replaced while it is read. The file is closed when the iteration
        ends.
        """
        path = self._arguments[0][shard]
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
            index = self._index(shard, os.fstat(file.fileno()).st_mtime_ns)
        except OSError as error:  # the shard went away
            yield from [Problem("unreadable", "", str(error))] * len(numbers)
            return
        with file:
            if index.summary.layout != layout:
                raise DataError(f"shard {path!r} {_REPLACED}")
            for number in numbers:
                try:
                    yield index.read(file, number, pixels=pixels)
                except (OSError, EOFError) as error:
                    yield Problem("unreadable", index.keys[number], str(error))
            if not index.describes(file):  # written in place
                raise DataError(f"shard {path!r} {_REPLACED}")
