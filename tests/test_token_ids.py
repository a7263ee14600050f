"""Token ids of many texts as one array are those of the texts, one by one."""

import numpy as np
import pytest

from data.token_ids import TokenIds


def draw_texts(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [rng.integers(0, 2**31 - 1, rng.integers(0, 6)).tolist() for _ in range(count)]


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (1, 0), (5, 8)])
def test_taking_and_joining_are_those_of_lists(counts):
    rng = np.random.default_rng(sum(counts))
    first, second = (draw_texts(rng, count) for count in counts)
    texts = [*first, *second]
    joined = TokenIds.join([TokenIds.of(first), TokenIds.empty(0), TokenIds.of(second)])
    assert joined.tolist() == TokenIds.of(texts).tolist() == texts
    assert joined.lengths.tolist() == [len(text) for text in texts]
    rows = rng.integers(0, max(1, len(texts)), 2 * len(texts))
    assert joined.take(rows).tolist() == [texts[row] for row in rows]
    # of a part of a longer array too, as a memory map's is
    inner = joined[len(first) :]
    assert inner.tolist() == second
    assert TokenIds.join([inner, inner]).tolist() == second * 2
    assert joined[1:-1].tolist() == texts[1:-1]
    assert inner.padded(6, 0)[0].tolist() == [text + [0] * (6 - len(text)) for text in second]


def test_padding_leaves_every_text_whole():
    texts = draw_texts(np.random.default_rng(0), 20)
    length = max(map(len, texts))
    ids, mask = TokenIds.of(texts).padded(length, 7)
    assert ids.dtype == mask.dtype == np.int64
    for text, row, kept in zip(texts, ids.tolist(), mask.tolist(), strict=True):
        assert row == text + [7] * (length - len(text))
        assert kept == [1] * len(text) + [0] * (length - len(text))


def test_a_text_longer_than_its_row_is_refused():
    with pytest.raises(ValueError, match="3 tokens, padded to 2"):
        TokenIds.of([[1], [1, 2, 3]]).padded(2, 0)
