"""The order of samples: pure functions from a position to a sample.

Nothing here knows ranks or loader workers, so no number of either can change what is trained on,
and a run resumes anywhere by arithmetic alone.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data.config import check_weights
from data.errors import UsageError

# The purpose of a shuffle is part of its seed: numpy pads short seeds with zeros, so (seed, epoch)
# and (seed, epoch, block 0) alone would be one and the same.
_SHARDS, _SAMPLES, _MIX, _SOURCE = 1, 2, 3, 4


def permutation(n: int, *entropy: int) -> Int[np.ndarray, " n"]:
    """A shuffle of range(n) that depends on nothing but its arguments.

    Sorts raw bits, because numpy keeps bit generators the same from release to release but not
    `Generator.permutation` (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(bits, kind="stable")


class SampleOrder:
    """Epoch after epoch as one stream: shards permuted, samples shuffled in blocks of shards.

    Where an epoch ends within a batch, the next epoch fills the batch. Holds two blocks of samples
    and one permutation of shards, whatever the size of the data set.
    """

    def __init__(self, counts: Sequence[int], seed: int, block_shards: int = 16) -> None:
        """`counts`: samples per shard. `block_shards`: shards shuffled together."""
        if block_shards < 1:
            raise UsageError(f"data.block_shards {block_shards}: at least 1")
        if seed < 0:
            raise UsageError(f"seed {seed}: at least 0")
        self._counts = np.asarray(counts, dtype=np.int64)
        self._seed = seed
        self._block_shards = block_shards
        self.num_samples = int(self._counts.sum())
        if self.num_samples == 0:
            raise UsageError(f"there is no good sample in {len(self._counts)} shards")
        self._epoch_cache: tuple[int, np.ndarray, np.ndarray] | None = None
        self._block_cache: dict[tuple[int, int], np.ndarray] = {}

    def slice(self, start: int, stop: int) -> Int[np.ndarray, "n 3"]:
        """(epoch, shard, sample in shard) of the positions start <= p < stop."""
        parts: list[np.ndarray] = []
        position = start
        while position < stop:
            epoch, within = divmod(position, self.num_samples)
            shards, block_ends = self._epoch(epoch)
            block = int(np.searchsorted(block_ends, within, side="right"))
            first = int(block_ends[block - 1]) if block else 0
            rows = self._block(epoch, block, shards)
            rows = rows[within - first : within - first + stop - position]
            parts.append(np.insert(rows, 0, epoch, axis=1))
            position += len(rows)
        return np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and where each block of them ends."""
        cached = self._epoch_cache  # read and replaced at once, for threads
        if cached is None or cached[0] != epoch:
            shards = permutation(len(self._counts), _SHARDS, self._seed, epoch)
            starts = np.arange(0, len(shards), self._block_shards)
            block_ends = np.cumsum(np.add.reduceat(self._counts[shards], starts))
            self._epoch_cache = cached = (epoch, shards, block_ends)
        return cached[1], cached[2]

    def _block(self, epoch: int, block: int, shards: np.ndarray) -> np.ndarray:
        """(shard, sample) rows of one block, shuffled."""
        cached = self._block_cache.get((epoch, block))
        if cached is None:
            members = shards[block * self._block_shards : (block + 1) * self._block_shards]
            counts = self._counts[members]
            shard = np.repeat(members, counts)
            first = np.repeat(np.cumsum(counts) - counts, counts)
            rows = np.stack([shard, np.arange(len(shard)) - first], axis=1)
            shuffle = permutation(len(rows), _SAMPLES, self._seed, epoch, block)
            cached = rows[shuffle]
            newest = list(self._block_cache.items())[-1:]
            self._block_cache = {**dict(newest), (epoch, block): cached}
        return cached


class MixedOrder:
    """Several sources, each with its own epochs, mixed in fixed proportion.

    Each cycle of `CYCLE` positions holds every source's exact share, shuffled: finding a position
    takes the work of one cycle, wherever it is.
    """

    CYCLE = 1024

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        weights: Sequence[float],
        seed: int,
        shard_numbers: Sequence[Sequence[int]],
    ) -> None:
        """`weights`: positive, any scale. `shard_numbers`: what each source's shards are called."""
        check_weights("weights", weights, "sources", len(orders), zeros=False)
        self._orders = list(orders)
        self._numbers = [np.asarray(numbers, dtype=np.int64) for numbers in shard_numbers]
        self._seed = seed
        self._shares = _shares(np.asarray(weights, dtype=np.float64), self.CYCLE)
        self.num_samples = sum(order.num_samples for order in orders)

    def slice(self, start: int, stop: int) -> Int[np.ndarray, "n 3"]:
        """(source's epoch, shard, sample in shard) of the positions start <= p < stop."""
        parts: list[np.ndarray] = []
        for cycle in range(start // self.CYCLE, -(-stop // self.CYCLE)):
            base = cycle * self.CYCLE
            low, high = max(start, base) - base, min(stop, base + self.CYCLE) - base
            pattern = np.repeat(np.arange(len(self._orders)), self._shares)
            pattern = pattern[permutation(self.CYCLE, _MIX, self._seed, cycle)]
            rows = np.empty((high - low, 3), dtype=np.int64)
            for source, order in enumerate(self._orders):
                before = cycle * int(self._shares[source])
                before += int((pattern[:low] == source).sum())
                here = pattern[low:high] == source
                rows[here] = order.slice(before, before + int(here.sum()))
                rows[here, 1] = self._numbers[source][rows[here, 1]]
            parts.append(rows)
        return np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)


Order = SampleOrder | MixedOrder


def source_seed(seed: int, source: int) -> int:
    """A seed of its own for each source of one run."""
    return derived_seed(_SOURCE, seed, source)


def derived_seed(*entropy: int) -> int:
    """64 bits that depend on nothing but the arguments."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _shares(weights: np.ndarray, total: int) -> Int[np.ndarray, " k"]:
    """`weights` as whole numbers that add up to `total`, at least 1 each (largest remainder)."""
    if len(weights) > total:
        raise UsageError(f"data.weights has {len(weights)} weights: at most {total}")
    exact = weights / weights.sum() * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    while (shares == 0).any():
        shares[np.argmin(shares)] += 1
        shares[np.argmax(shares)] -= 1
    return shares
