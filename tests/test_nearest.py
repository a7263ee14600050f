"""Many queries at once find what FAISS finds one by one."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from index_maker import clustered

from retrieval.index import nearest
from retrieval.index.create import KINDS, new_index, search
from retrieval.index.tune import pack

WIDTH = 48


def opened(kind: str, count: int, tmp_path: Path) -> faiss.IndexIDMap:
    """As a searcher opens it: memory-mapped."""
    vectors = clustered(count, WIDTH)
    index = new_index(kind, WIDTH, count, vectors)  # type: ignore[arg-type]
    index.add_with_ids(vectors, np.arange(count))
    faiss.write_index(index, str(tmp_path / "index"))
    return faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP_IFC)


@pytest.mark.parametrize("kind", ["flat", "flat16"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_many_queries_find_what_each_finds_alone(
    kind: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 300)
    whole = opened(kind, 1000, tmp_path)
    index = faiss.downcast_index(whole.index)
    queries, k = clustered(40, WIDTH, seed=1), 20
    packed = None if share == 1 else pack(np.random.default_rng(0).random(1000) < share)
    vectors = nearest.stored_vectors(index)
    assert vectors is not None
    similarities, rows = nearest.scan(vectors, queries, k, packed)
    alone = [search(index, query[None], k, 1, 1, packed) for query in queries]
    np.testing.assert_array_equal(rows, np.concatenate([r for _, r in alone]))
    expected = np.concatenate([s for s, _ in alone])[rows >= 0]
    np.testing.assert_allclose(similarities[rows >= 0], expected, atol=1e-6)
    if share == 0.01:
        assert (rows == -1).any()  # fewer than k match


def test_other_kinds_and_few_queries_are_left_to_faiss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        whole = opened(kind, 400, tmp_path)
        held = nearest.stored_vectors(faiss.downcast_index(whole.index))
        assert (held is not None) == (kind in ("flat", "flat16"))
    assert not nearest.pays(nearest.MIN_QUERIES - 1, 1000, None)
    assert nearest.pays(nearest.MIN_QUERIES, 1000, None)
    half = pack(np.arange(1000) % 2 == 0)
    assert not nearest.pays(nearest.MIN_QUERIES, 1000, half)
    assert nearest.pays(2 * nearest.MIN_QUERIES, 1000, half)
