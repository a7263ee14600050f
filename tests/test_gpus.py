"""Lists on a GPU, and graphs made by one, answer as the CPU's do, also where the GPU fails.

A CPU stands in for the GPU: it searches what would be copied, and makes the graphs.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from index_maker import PATCH, all_vectors, clustered, nearest, recall, write_embeddings

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.index import build, create, gpu_check, gpus, segments, snapshot
from retrieval.index.build import add_embeddings, build_index, compact_index, delete_ids
from retrieval.index.create import new_index
from retrieval.index.exact import ExactVectors
from retrieval.index.gpu_check import Gpus
from retrieval.index.nearest import stored_vectors
from retrieval.index.snapshot import Snapshot


def graph_on_cpu(vectors: np.ndarray, links: int) -> np.ndarray:
    """In place of CAGRA's: half of the links to the nearest, half to any."""
    best = np.argsort(-(vectors @ vectors.T), axis=1)[:, 1 : links // 2 + 1]
    far = np.random.default_rng(0).integers(0, len(vectors), best.shape)
    return np.hstack([best, far])


def blind_alleys(vectors: np.ndarray, links: int) -> np.ndarray:
    """Every row is linked to the first few alone."""
    return np.tile(np.arange(links), (len(vectors), 1))


def beyond_the_end(vectors: np.ndarray, links: int) -> np.ndarray:
    return graph_on_cpu(vectors, links) + 1


def no_memory(vectors: np.ndarray, links: int) -> np.ndarray:
    raise MemoryError("std::bad_alloc")


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., np.ndarray]], None]:
    """Lets builds take graphs from a function, as if a GPU had made them."""

    def use(make: Callable[..., np.ndarray]) -> None:
        monkeypatch.setattr(gpus, "cagra_graph", make)
        monkeypatch.setattr(segments, "has_cagra", lambda: True)
        monkeypatch.setattr(segments, "MIN_LINKED", 1000)
        real = segments.write_segment
        monkeypatch.setattr(
            build, "write_segment", lambda *args: real(*args[:8], 1, None, *args[10:])
        )

    segments.say_once.cache_clear()
    return use


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go to a GPU stays where it is."""
    monkeypatch.setattr(gpus, "num_gpus", lambda device: int(device != "cpu"))
    monkeypatch.setattr(gpus, "find_gpus", lambda: Gpus(1, True))
    monkeypatch.setattr(gpus, "gpu_memory", lambda: 2**40)
    monkeypatch.setattr(gpus, "copy_to_gpus", lambda index, *_: index)
    gpus.say_once.cache_clear()


@pytest.fixture
def embeddings(tiny_model: LitModel, model_dir: Path, tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "embeddings", tiny_model, model_dir, (2000, 1000))


# ---- lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index_type", ["ivf", "ivfpq"])
def test_lists_on_a_gpu_answer_as_on_the_cpu(
    index_type, lists, embeddings: Path, tmp_path: Path
) -> None:
    """Filters too, which FAISS does not apply there; and a k that no GPU looks up."""
    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")
    delete_ids(tmp_path / "index", [0, 8])
    queries = all_vectors(embeddings)[0][::60]
    cpu, gpu = (Snapshot.open(tmp_path / "index", device) for device in ("cpu", "cuda"))
    for where in (None, {"even": True}, {"key": {"in": ["0-0-2", "0-1-5"]}}):
        for k in (10, 2500):
            expected = cpu.nearest(queries, k, PATCH, where)
            found = gpu.nearest(queries, k, PATCH, where)
            assert recall(found[1], expected[1]) >= 0.97
            assert not {0, 8} & set(found[1].ravel().tolist())


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate {} MiB.")
NO_HANDLE = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
NO_BYTES = RuntimeError("Error in GpuResources: cudaMalloc of {} bytes failed")


@pytest.mark.parametrize(
    ("index_type", "error"),
    [("flat", FULL), ("flat", NO_HANDLE), ("ivf", NO_BYTES), ("ivfpq", NO_BYTES)],
)
def test_a_gpu_that_fails_in_a_search_leaves_it_to_the_cpu(
    index_type, error, lists, embeddings: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """And stderr is told once, although each failure names other sizes."""
    sizes = itertools.count(1)

    def fails(*_: object, **__: object) -> None:
        raise type(error)(str(error).format(next(sizes)))

    def on_device(index: faiss.Index, *_: object) -> ExactVectors:
        vectors = stored_vectors(index)
        assert vectors is not None
        return ExactVectors(vectors, [torch.device("cpu")])

    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")
    queries = all_vectors(embeddings)[0][::60]
    expected = Snapshot.open(tmp_path / "index").nearest(queries, 10, PATCH)
    if index_type == "flat":
        monkeypatch.setattr(snapshot, "to_gpus", on_device)
        monkeypatch.setattr(ExactVectors, "nearest", fails)
    gpu = Snapshot.open(tmp_path / "index", "cuda")
    for copy in gpu._gpu.values():
        if isinstance(copy, gpus.ListsOnGpus):
            copy._index = SimpleNamespace(search=fails)
    for _ in range(2):
        found = gpu.nearest(queries, 10, PATCH)
        np.testing.assert_array_equal(found[1], expected[1])
    assert capsys.readouterr().err.count("searching on the CPU") == 1


@pytest.mark.parametrize("index_type", ["ivf", "ivfpq"])
def test_lists_are_refused_as_replicas_by_several_gpus_alone(
    index_type, lists, embeddings: Path, tmp_path: Path, monkeypatch
) -> None:
    """One GPU holds every vector, whatever it is called."""
    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")
    queries = all_vectors(embeddings)[0][::60]
    one, same = (Snapshot.open(tmp_path / "index", where) for where in ("cuda", "replicas"))
    assert [type(copy) for copy in same._gpu.values()] == [gpus.ListsOnGpus]
    np.testing.assert_array_equal(
        same.nearest(queries, 10, PATCH)[1], one.nearest(queries, 10, PATCH)[1]
    )
    monkeypatch.setattr(gpus, "num_gpus", lambda device: 2)
    with pytest.raises(UsageError, match="replicas take no nprobe"):
        Snapshot.open(tmp_path / "index", "replicas")


def test_faiss_is_not_asked_on_a_gpu_that_is_nearly_full(lists, monkeypatch, capsys) -> None:
    """It would end the process."""
    index = new_index("ivf", 8, 100, np.eye(100, 8, dtype=np.float32)).index
    assert gpus.to_gpus(index, "ivf", "auto", 1000) is not None
    monkeypatch.setattr(gpus, "gpu_memory", lambda: gpus.TEMP_BYTES)
    monkeypatch.setattr(gpus, "copy_to_gpus", lambda *_: pytest.fail("FAISS was asked"))
    assert gpus.to_gpus(index, "ivf", "auto", 3 * 2**20) is None
    assert "its 3 MiB do not fit the GPU's memory" in capsys.readouterr().err
    with pytest.raises(UsageError, match="device cuda: its 3 MiB do not fit"):
        gpus.to_gpus(index, "ivf", "cuda", 3 * 2**20)


def test_resources_with_which_faiss_failed_are_not_used_again(monkeypatch) -> None:
    """FAISS marks a GPU as ready before it takes scratch memory there."""
    asked = []

    def copies(resources: list[object], index: faiss.Index, cloner: object) -> faiss.Index:
        asked.append(resources[0])
        if len(asked) == 1:
            raise RuntimeError("Error: 'err == cudaSuccess' failed: alloc fail")
        return index

    monkeypatch.setattr(gpus, "find_gpus", lambda: Gpus(1, True))
    monkeypatch.setattr(faiss, "index_cpu_to_gpu_multiple_py", copies)
    gpus.resources.cache_clear()
    index = faiss.IndexFlatIP(8)
    with pytest.raises(RuntimeError, match="alloc fail"):
        gpus.copy_to_gpus(index, 1)
    assert gpus.copy_to_gpus(index, 1) is gpus.copy_to_gpus(index, 1)
    first, second, third = asked
    assert first is not second
    assert second is third
    gpus.resources.cache_clear()


def test_a_gpu_that_fails_in_a_build_is_a_sentence() -> None:
    def building() -> Iterator[int]:
        yield 1
        raise RuntimeError("Error: cudaMalloc failed, out of memory\n")

    built = gpus.gpu_failures(building())
    assert next(built) == 1
    with pytest.raises(UsageError, match=r"GPU failed while .* memory\); allowed: device cpu$"):
        next(built)


@pytest.mark.parametrize("index_type", ["ivf", "ivfpq", "rabitq"])
def test_what_gpus_train_with_is_freed_and_trains_the_same(index_type, monkeypatch) -> None:
    vectors = clustered(3000, 48)
    on_cpu = new_index(index_type, 48, 3000, vectors)
    made: list[faiss.Index] = []

    def copies(index: faiss.Index, _: int) -> faiss.Index:
        made.append(index)
        return index

    monkeypatch.setattr(create, "copy_to_gpus", copies)
    whole = new_index(index_type, 48, 3000, vectors, gpus=1)
    np.testing.assert_array_equal(faiss.serialize_index(whole), faiss.serialize_index(on_cpu))
    assert len(made) == (2 if index_type == "ivfpq" else 1)
    assert all(index.thisown and index.ntotal for index in made)  # used, and Python's to free


# ---- graphs --------------------------------------------------------------------------------


def check(opened: Snapshot, vectors: np.ndarray, ids: np.ndarray) -> None:
    queries = vectors[::40]
    expected = nearest(queries, vectors, ids, 10)
    assert recall(opened.nearest(queries, 10, PATCH)[1], expected) >= 0.98
    even = ids % 4 == 0
    expected = nearest(queries, vectors[even], ids[even], 10)
    assert recall(opened.nearest(queries, 10, PATCH, {"even": True})[1], expected) >= 0.95


def test_an_hnsw_linked_by_a_gpu_is_searched_and_changed_as_any(
    linked, embeddings: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path, capsys
) -> None:
    linked(graph_on_cpu)
    folder = tmp_path / "index"
    build_index(embeddings, folder, index_type="hnsw", device="cpu")
    vectors, ids = all_vectors(embeddings)
    opened = Snapshot.open(folder)
    (segment,) = opened.segments
    assert type(segment.indexes[PATCH]) is faiss.IndexHNSWFlat
    check(opened, vectors, ids)
    np.testing.assert_array_equal(segment.reconstruct(PATCH, np.arange(3000)), vectors)

    more = write_embeddings(tmp_path / "more", tiny_model, model_dir, (500,), seed=1)
    assert add_embeddings(folder, more) == 500
    delete_ids(folder, ids[:100].tolist())
    compact_index(folder, "cpu")
    opened = Snapshot.open(folder)
    assert [segment.index_type for segment in opened.segments] == ["hnsw"]
    added = np.setdiff1d(opened.ids(), ids)
    left = np.concatenate([vectors[100:], all_vectors(more)[0]])
    found = opened.nearest(left[::40], 10, PATCH)[1]
    assert recall(found, nearest(left[::40], left, np.concatenate([ids[100:], added]), 10)) >= 0.98
    assert "on the CPU" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (blind_alleys, "the GPU's graph finds"),
        (beyond_the_end, "vectors that there are not"),
        (no_memory, "the GPU fails (std::bad_alloc)"),
    ],
)
def test_a_graph_that_a_gpu_gets_wrong_is_made_by_the_cpu(
    make, words, linked, embeddings: Path, tmp_path: Path, capsys
) -> None:
    build_index(embeddings, tmp_path / "expected", index_type="hnsw", device="cpu")
    linked(make)
    build_index(embeddings, tmp_path / "index", index_type="hnsw", device="cpu")
    said = capsys.readouterr().err
    assert said.count("is made on the CPU: ") == 1
    assert words in said
    files = [tmp_path / name / f"patch_{PATCH}/image.index" for name in ("expected", "index")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_trial_of_graphs_asks_what_the_build_asks(linked, monkeypatch, capsys) -> None:
    linked(graph_on_cpu)
    exec(gpu_check.CAGRA_TRIAL, {})
    assert capsys.readouterr().out == f"GPUs: {faiss.get_num_gpus()}\n"
    linked(blind_alleys)
    with pytest.raises(SystemExit, match="finds"):
        exec(gpu_check.CAGRA_TRIAL, {})


@pytest.mark.gpu
def test_cagra_links_what_an_exact_scan_finds() -> None:
    if not gpu_check.has_cagra():
        pytest.skip("this FAISS has no CAGRA")
    vectors = clustered(20_000, 64)
    index = faiss.IndexHNSWFlat(64, 32, faiss.METRIC_INNER_PRODUCT)
    index.init_level0 = False
    index.add(vectors)
    assert gpus.link_by_gpu(index) == ""
    assert index.hnsw.nb_neighbors(0) == gpus.cagra_graph(vectors, 64).shape[1]
