"""Exact search by torch finds what FAISS finds, on any device; here on the CPU, and `-m gpu`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from index_maker import PATCH, all_vectors, clustered, nearest, write_embeddings

from contrastive.model.lit import LitModel
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index import exact, snapshot
from retrieval.index.build import add_embeddings, build_index, compact_index, delete_ids
from retrieval.index.create import add, new_index
from retrieval.index.exact import ExactVectors, RunningBest, nearest_of
from retrieval.index.faiss_setup import faiss
from retrieval.index.filters import Selection
from retrieval.index.nearest import nearest_exactly, stored_vectors
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.segments import write_segment
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import tune

WIDTH = 48
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def flat(dtype: str, vectors: np.ndarray) -> faiss.IndexIDMap:
    """A flat or flat16 index of vectors, in what owns it."""
    whole = new_index("flat" if dtype == "float32" else "flat16", WIDTH, len(vectors), vectors)
    whole.add_with_ids(vectors, np.arange(len(vectors)))
    return whole


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("layout", ["one", "shards", "replicas"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [None, 0.5, 0.01, 0.0])
def test_torch_finds_what_faiss_finds(
    dtype: str, layout: str, share: float | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", 40_000)  # several blocks
    vectors, queries = clustered(3000, WIDTH), clustered(33, WIDTH, seed=1)
    whole = flat(dtype, vectors)
    index = faiss.downcast_index(whole.index)
    stored = stored_vectors(index)
    assert stored is not None
    devices = [torch.device(device)] * (1 if layout == "one" else 3)
    held = ExactVectors(stored, devices, replicas=layout == "replicas")
    chosen = None
    if share is not None:
        chosen = Selection.of(np.random.default_rng(0).random(3000) < share)
    for asked in (queries[:1], queries):
        for k in (1, 10, 60):
            expected = nearest_exactly(index, asked, k, None if chosen is None else chosen.packed)
            similarities, rows = held.nearest(asked, k, chosen)
            np.testing.assert_array_equal(rows, expected[1])
            np.testing.assert_allclose(
                similarities[rows >= 0], expected[0][rows >= 0], rtol=0, atol=1e-6
            )
            assert np.isneginf(similarities[rows < 0]).all()
    assert (rows < 0).any() == (share in (0.01, 0.0))  # fewer than k match


def test_more_than_there_are_and_none_at_all() -> None:
    vectors = clustered(5, WIDTH)
    held = ExactVectors(vectors, [torch.device("cpu")] * 2)
    similarities, rows = held.nearest(clustered(3, WIDTH, seed=1), 9)
    assert rows.shape == similarities.shape == (3, 9)
    assert (np.sort(rows[:, :5]) == np.arange(5)).all()
    assert (rows[:, 5:] == -1).all()
    nothing = ExactVectors(vectors[:0], [torch.device("cpu")])
    assert (nothing.nearest(clustered(3, WIDTH, seed=1), 2)[1] == -1).all()
    assert held.nearest(vectors[:0], 2)[1].shape == (0, 2)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_of_equal_vectors_the_first_are_found(
    dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4_000)
    vectors = np.tile(clustered(4, WIDTH), (250, 1)).astype(dtype)  # 250 equal ones of each
    query = clustered(4, WIDTH)[2:3]
    for count in (1, 2):
        held = ExactVectors(vectors, [torch.device(device)] * count)
        assert held.nearest(query, 5)[1].tolist() == [[2, 6, 10, 14, 18]]


def test_negative_and_zero_similarities_are_ranked() -> None:
    vectors = np.eye(3, 4, dtype=np.float32) * [[-1.0], [1.0], [-0.5]]
    query = np.array([[1.0, -0.0, 1.0, 0.0]], np.float32)
    similarities, rows = ExactVectors(vectors.astype(np.float32), [torch.device("cpu")]).nearest(
        query, 3
    )
    assert rows.tolist() == [[1, 2, 0]]
    assert similarities.tolist() == [[0.0, -0.5, -1.0]]


def test_float16_vectors_meet_queries_of_full_precision() -> None:
    """Queries rounded to float16 would be off by 2e-4 of their length."""
    vectors, queries = clustered(2000, 512).astype(np.float16), clustered(20, 512, seed=1)
    expected = queries.astype(float) @ vectors.astype(float).T
    similarities, rows = ExactVectors(vectors, [torch.device("cpu")]).nearest(queries, 5)
    rounded = queries.astype(np.float16).astype(float) @ vectors.astype(float).T
    error = abs(similarities - np.take_along_axis(expected, rows, 1)).max()
    assert error < 5e-7 < abs(rounded - expected).max()


def test_products_are_float32_where_somebody_allows_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with exact._float32_products():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_best_of_blocks_is_the_best_of_all() -> None:
    vectors, queries = clustered(1000, WIDTH), clustered(9, WIDTH, seed=1)
    best = RunningBest(queries, 10)
    for part in np.split(vectors, [300, 301, 800]):
        best.add(torch.from_numpy(part))
    expected = ExactVectors(vectors, [torch.device("cpu")]).nearest(queries, 10)[1]
    np.testing.assert_array_equal(best.rows(), expected)
    few = RunningBest(queries, 10)
    few.add(torch.from_numpy(vectors[:3]))
    assert (few.rows()[:, 3:] == -1).all()


def test_lists_are_those_that_faiss_assigns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4_000)
    centroids, vectors = clustered(30, WIDTH, seed=2), clustered(500, WIDTH)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(centroids)
    found = nearest_of(torch.from_numpy(centroids), torch.from_numpy(vectors))
    np.testing.assert_array_equal(found.numpy(), index.search(vectors, 1)[1][:, 0])


@pytest.mark.parametrize("index_type", ["flat", "ivf", "ivfpq", "rabitq"])
def test_lists_that_torch_fills_are_those_that_faiss_fills(index_type) -> None:
    vectors = clustered(3000, WIDTH)
    whole = [new_index(index_type, WIDTH, 3000, vectors) for _ in range(2)]
    for part in np.split(np.arange(3000), [1000, 1001]):
        add(whole[0], vectors[part], 2 * part)
        add(whole[1], vectors[part], 2 * part, torch.from_numpy(vectors[part]))
    files = [faiss.serialize_index(index) for index in whole]
    np.testing.assert_array_equal(files[0], files[1])


@pytest.mark.parametrize("index_type", ["ivf", "ivfpq", "rabitq"])
def test_a_segment_filled_on_a_device_is_the_same_and_tuned_the_same(
    index_type, tmp_path: Path
) -> None:
    vectors = clustered(3000, WIDTH)
    ids = np.arange(3000)
    columns = {"id": ids, "offset": ids, "size": ids, "key": ids.astype(str)}
    columns |= {"caption": columns["key"], "shard": columns["key"]}
    rows = RowsInMemory({PATCH: vectors}, pa.Table.from_pydict(columns, schema=METADATA_SCHEMA))
    written = []
    for device in (None, torch.device("cpu")):
        entry, trials = write_segment(
            tmp_path / str(device), 0, index_type, [rows], (0, 3000), [PATCH], WIDTH, device=device
        )
        opened = faiss.read_index(str(tmp_path / str(device) / f"patch_{PATCH}" / "image.index"))
        inner = faiss.downcast_index(opened.index)
        written.append((entry.blake2b, tune(inner, trials[PATCH], 10.0)))
        queries, found, _ = trials[PATCH]
        np.testing.assert_array_equal(found, nearest(queries, vectors, ids, 10))
    assert written[0][0] == written[1][0]
    assert written[0][1].nprobe == written[1][1].nprobe
    assert abs(written[0][1].recall - written[1][1].recall) <= 0.01  # float16 vectors of ivfpq


# ---- through an index folder ---------------------------------------------------------------


@pytest.mark.parametrize("index_type", ["flat", "flat16"])
def test_an_index_on_a_device_changes_as_on_the_cpu(
    index_type,
    tiny_model: LitModel,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Filters, deletions, additions and a compaction."""
    first = write_embeddings(tmp_path / "first", tiny_model, model_dir, (900, 300))
    more = write_embeddings(tmp_path / "more", tiny_model, model_dir, (200,), seed=3)
    index = tmp_path / "index"
    build_index(first, index, index_type=index_type, device="cpu")
    queries = all_vectors(first)[0][::40] + 0.3 * all_vectors(more)[0][:30]

    def on_device(part: faiss.Index, *_: object) -> ExactVectors:
        vectors = stored_vectors(part)
        assert vectors is not None
        return ExactVectors(vectors, [torch.device("cpu")] * 2)

    def agree() -> None:
        plain = Snapshot.open(index, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "to_gpus", on_device)
            held = Snapshot.open(index)
        for where in (None, {"even": True}, {"key": {"in": ["0-0-2", "0-1-5"]}}, {"key": "no"}):
            for count in (1, 30):
                expected = plain.nearest(queries[:count], 12, PATCH, where)
                found = held.nearest(queries[:count], 12, PATCH, where)
                np.testing.assert_array_equal(found[1], expected[1])
                np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)

    agree()
    best = Snapshot.open(index).nearest(queries, 2, PATCH)[1]
    delete_ids(index, best[:, 0].tolist())
    agree()
    add_embeddings(index, more)
    agree()
    compact_index(index, device="cpu")
    agree()


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", ["flat", "flat16", "ivf", "ivfpq"])
def test_a_gpu_builds_the_index_that_the_cpu_builds(
    index_type, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    source = write_embeddings(tmp_path / "source", tiny_model, model_dir, (6000,))
    vectors, ids = all_vectors(source)
    for device in ("cpu", "cuda"):
        build_index(source, tmp_path / device, index_type=index_type, device=device)  # type: ignore[arg-type]
        opened = Snapshot.open(tmp_path / device, device)  # type: ignore[arg-type]
        found = opened.nearest(vectors[::60], 10, PATCH)[1]
        np.testing.assert_array_equal(found[:, 0], ids[::60])
        np.testing.assert_array_equal(opened.ids(), ids)
