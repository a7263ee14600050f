"""Samples of local shards by number, read at random."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from data.problems import Problem
from data.shards.index import ShardIndex, load_index
from data.shards.tar import TarSample


class SampleStore:
    """Samples of local shards by (shard, sample) number, with the last few indices in memory."""

    def __init__(self, shards: Sequence[str], index_dir: str, keep: int) -> None:
        """`keep`: indices that stay in memory."""
        self._arguments = shards, index_dir, keep
        self._index: Callable[[int], ShardIndex] = lru_cache(keep)(
            lambda shard: load_index(shards[shard], index_dir)
        )

    def __reduce__(self) -> tuple[object, ...]:  # loader workers start with an empty cache
        return SampleStore, self._arguments

    def read(
        self, shard: int, numbers: Sequence[int], *, pixels: bool
    ) -> Iterator[TarSample | Problem]:
        """These samples of one shard, in turn; the problem "unreadable" for each that is not there.

        `pixels`: read the images' bytes too. The file is closed when the iteration ends.
        """
        try:
            index = self._index(shard)
            file = open(index.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:  # the shard went away
            yield from [Problem("unreadable", "", str(error))] * len(numbers)
            return
        with file:
            for number in numbers:
                try:
                    yield index.read(file, number, pixels=pixels)
                except (OSError, EOFError, IndexError) as error:  # or was replaced
                    key = index.keys[number] if number < len(index) else ""
                    yield Problem("unreadable", key, str(error))
