"""The order of samples is a pure function."""

import numpy as np
import pytest

from data.errors import UsageError
from data.pipeline.order import MixedOrder, SampleOrder, permutation

COUNTS = [5, 0, 17, 3, 11, 1, 0, 8]
TOTAL = sum(COUNTS)


def everything() -> set[tuple[int, int]]:
    return {(shard, i) for shard, count in enumerate(COUNTS) for i in range(count)}


@pytest.mark.parametrize("block_shards", [1, 2, 3, 16])
def test_every_epoch_holds_every_sample_exactly_once(block_shards: int) -> None:
    order = SampleOrder(COUNTS, seed=7, block_shards=block_shards)
    for epoch in range(4):
        rows = order.slice(epoch * TOTAL, (epoch + 1) * TOTAL)
        assert set(rows[:, 0]) == {epoch}
        assert len(rows) == TOTAL
        assert set(map(tuple, rows[:, 1:].tolist())) == everything()


def test_any_slice_equals_the_same_part_of_the_whole() -> None:
    whole = SampleOrder(COUNTS, seed=3, block_shards=2).slice(0, 5 * TOTAL)
    rng = np.random.default_rng(0)
    order = SampleOrder(COUNTS, seed=3, block_shards=2)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, 5 * TOTAL + 1, 2).tolist())
        assert (order.slice(start, stop) == whole[start:stop]).all()


def test_order_depends_on_seed_and_epoch() -> None:
    first, second = (SampleOrder(COUNTS, seed).slice(0, 2 * TOTAL) for seed in (0, 1))
    assert (first != second).any()
    assert (first[:TOTAL, 1:] != first[TOTAL:, 1:]).any()


def test_order_stays_the_same_in_later_versions() -> None:
    assert permutation(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    order = SampleOrder([2, 3, 4], seed=0, block_shards=2)
    expected = [[0, 1, 2], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 2]]
    assert order.slice(7, 12).tolist() == expected


def test_a_block_mixes_its_shards_and_no_others() -> None:
    order = SampleOrder([50] * 6, seed=0, block_shards=2)
    rows = order.slice(0, 300)
    for block in range(3):
        shards = rows[block * 100 : (block + 1) * 100, 1]
        assert len(set(shards.tolist())) == 2
        assert len(set(shards[:20].tolist())) == 2


def test_memory_holds_blocks_and_not_the_dataset() -> None:
    order = SampleOrder([1000] * 10_000, seed=0, block_shards=4)  # 10 million samples
    for start in (0, 4_999_990, 9_999_000, 10_000_000):
        assert len(order.slice(start, start + 64)) == 64
    held = sum(rows.nbytes for rows in order._block_cache.values())
    assert held <= 2 * 4 * 1000 * 2 * 8


def test_mixing_keeps_each_sources_own_epochs_and_the_shares() -> None:
    counts = [[7, 5], [30], [2, 2, 2]]
    orders = [SampleOrder(source, seed) for seed, source in enumerate(counts)]
    mixed = MixedOrder(orders, [5.0, 3.0, 2.0], seed=1, shard_numbers=[[0, 1], [2], [3, 4, 5]])
    rows = mixed.slice(0, 4 * MixedOrder.CYCLE)
    source = np.array([0, 0, 1, 2, 2, 2])[rows[:, 1]]
    for number, (order, offset) in enumerate(zip(orders, [0, 2, 3], strict=True)):
        mine = rows[source == number]
        mine[:, 1] -= offset
        assert (mine == order.slice(0, len(mine))).all()
    shares = np.bincount(source) / len(rows)
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, stop = sorted(rng.integers(0, len(rows), 2).tolist())
        assert (mixed.slice(start, stop) == rows[start:stop]).all()


def test_tiny_weights_still_get_a_share() -> None:
    orders = [SampleOrder([3], seed) for seed in range(3)]
    mixed = MixedOrder(orders, [1e9, 1.0, 1.0], seed=0, shard_numbers=[[0], [1], [2]])
    shards = mixed.slice(0, MixedOrder.CYCLE)[:, 1]
    assert np.bincount(shards).tolist() == [MixedOrder.CYCLE - 2, 1, 1]


def test_impossible_values_are_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="no good sample in 2 shards"):
        SampleOrder([0, 0], seed=0)
    with pytest.raises(UsageError, match="block_shards 0"):
        SampleOrder([1], seed=0, block_shards=0)
    with pytest.raises(UsageError, match="positive"):
        MixedOrder([SampleOrder([1], 0)], [0.0], seed=0, shard_numbers=[[0]])
