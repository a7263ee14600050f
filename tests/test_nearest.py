"""Many queries at once, by blocks, find what FAISS finds one by one."""

from pathlib import Path

import numpy as np
import pytest
from index_maker import clustered

from retrieval.index import nearest
from retrieval.index.config import INDEX_TYPES
from retrieval.index.create import new_index
from retrieval.index.faiss_setup import faiss
from retrieval.index.filters import pack

WIDTH = 48


def opened(index_type: str, count: int, tmp_path: Path) -> faiss.IndexIDMap:
    """As a searcher opens it: memory-mapped."""
    vectors = clustered(count, WIDTH)
    index = new_index(index_type, WIDTH, count, vectors)  # type: ignore[arg-type]
    index.add_with_ids(vectors, np.arange(count))
    faiss.write_index(index, str(tmp_path / "index"))
    return faiss.read_index(str(tmp_path / "index"), faiss.IO_FLAG_MMAP_IFC)


@pytest.mark.parametrize("index_type", ["flat", "flat16"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01, 0.0])
def test_many_queries_find_what_each_finds_alone(
    index_type: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 300)
    whole = opened(index_type, 1000, tmp_path)
    index = faiss.downcast_index(whole.index)
    queries, k = clustered(40, WIDTH, seed=1), 20
    packed = None if share == 1 else pack(np.random.default_rng(0).random(1000) < share)
    vectors = nearest.stored_vectors(index)
    assert vectors is not None
    alone = [nearest.nearest(index, query[None], k, 1, 1, packed) for query in queries]
    expected = np.concatenate([r for _, r in alone])
    for similarities, rows in (
        nearest.nearest_by_blocks(vectors, queries, k, packed),
        nearest.nearest(index, queries, k, 1, 1, packed),
    ):
        np.testing.assert_array_equal(rows, expected)
        scores = np.concatenate([s for s, _ in alone])[rows >= 0]
        np.testing.assert_allclose(similarities[rows >= 0], scores, atol=1e-6)
    if share <= 0.01:
        assert (rows == -1).any()  # fewer than k match


def test_only_exact_types_and_many_queries_are_multiplied_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied = []
    by_blocks = nearest.nearest_by_blocks
    monkeypatch.setattr(
        nearest, "nearest_by_blocks", lambda *args: multiplied.append(True) or by_blocks(*args)
    )
    queries, half = clustered(64, WIDTH, seed=1), pack(np.arange(400) % 2 == 0)
    for index_type in INDEX_TYPES:
        whole = opened(index_type, 400, tmp_path)
        index = faiss.downcast_index(whole.index)
        for count in (1, 64):
            for packed in (None, half):
                multiplied.clear()
                nearest.nearest(index, queries[:count], 5, 4, 16, packed)
                many = count == 64 and (index_type == "flat16" or packed is not None)
                assert bool(multiplied) == (many and index_type in ("flat", "flat16"))


def test_faiss_multiplies_from_four_queries_on_and_reads_for_one() -> None:
    """Told by rounding: a filter that lets all through is always read vector by vector."""
    vectors = clustered(1000, 384)
    index = faiss.IndexFlatIP(384)
    index.add(vectors)
    every = nearest.search_params(index, 1, 1, pack(np.ones(1000, bool)))
    queries = clustered(4, 384, seed=1)
    read = index.search(queries, 1000, params=every)[0]
    assert (index.search(queries[:1], 1000)[0] == read[:1]).all()
    multiplied = index.search(queries, 1000)[0]
    assert (multiplied != read).any()
    np.testing.assert_allclose(multiplied, read, atol=1e-6)
