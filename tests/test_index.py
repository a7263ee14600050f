"""Indexes: exact, approximate, found again by id, refused in one sentence when they cannot be."""

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from index_maker import PATCH, all_vectors, nearest, recall, write_embeddings

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.embed.partitions import vector_file
from retrieval.index import gpus, row_sources, segments
from retrieval.index.build import build_index, delete_ids
from retrieval.index.choose import RERANKED, bytes_per_vector, choose_index_type, pq_bytes
from retrieval.index.config import GPU_INDEX_TYPES, INDEX_TYPES
from retrieval.index.create import new_index
from retrieval.index.manifest import read_index_manifest
from retrieval.index.nearest import search_params
from retrieval.index.snapshot import Snapshot
from retrieval.search.searcher import Searcher

EXACT = {"flat": 1.0, "flat16": 0.98, "ivf": 0.9, "ivfpq": 0.9, "rabitq": 0.9, "hnsw": 0.95}


@pytest.fixture
def embeddings(tiny_model: LitModel, model_dir: Path, tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "embeddings", tiny_model, model_dir, (2000, 0, 1000))


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_index_finds_what_an_exact_scan_finds(
    index_type, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sources, "BLOCK_ROWS", 700)  # several blocks a partition
    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")
    snapshot = Snapshot.open(tmp_path / "index")
    assert [segment.index_type for segment in snapshot.segments] == [index_type]
    vectors, ids = all_vectors(embeddings)
    queries = vectors[::60]
    similarities, found = snapshot.nearest(queries, 10, PATCH)
    assert recall(found, nearest(queries, vectors, ids, 10)) >= EXACT[index_type]
    np.testing.assert_array_equal(found[:, 0], ids[::60])
    np.testing.assert_allclose(similarities[:, 0], 1, atol=2e-3)
    assert (np.diff(similarities, axis=1) <= 0).all()
    everything = snapshot.nearest(queries[:2], 10, PATCH, exact=True)[1]
    assert recall(everything, nearest(queries[:2], vectors, ids, 10)) >= 0.95


def test_words_are_written_while_vectors_are_added(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, adding = threading.Event(), threading.Event()
    write, add = segments.write_words, segments.add

    def write_later(*args: Any) -> Any:
        begun.set()
        assert adding.wait(60)
        return write(*args)

    def add_later(*args: Any) -> None:
        adding.set()
        assert begun.wait(60)
        add(*args)

    build_index(embeddings, tmp_path / "plain", index_type="flat", device="cpu")
    monkeypatch.setattr(segments, "write_words", write_later)
    monkeypatch.setattr(segments, "add", add_later)
    build_index(embeddings, tmp_path / "index", index_type="flat", device="cpu")
    plain, index = (read_index_manifest(tmp_path / name) for name in ("plain", "index"))
    assert plain.segments == index.segments  # sizes and digests of all files


def test_vectors_that_fail_leave_no_thread_that_writes(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, Any]] = []
    write, failed = segments.write_words, threading.Event()

    def write_later(*args: Any) -> Any:
        assert failed.wait(60)
        written.append(write(*args))
        return written[-1]

    def fail(*_: Any) -> None:
        failed.set()
        raise UsageError("no more")

    monkeypatch.setattr(segments, "write_words", write_later)
    monkeypatch.setattr(segments, "add", fail)
    with pytest.raises(UsageError, match="no more"):
        build_index(embeddings, tmp_path / "index", index_type="flat", device="cpu")
    assert len(written) == 1  # the thread has ended
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_what_does_not_fit_the_memory_is_built_in_several_segments(
    index_type, embeddings: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    width = tiny_model.embed_dim
    stored = bytes_per_vector(index_type, width) + (2 * width if index_type in RERANKED else 0)
    gib = 1100 * stored / 2**30  # 3,000 vectors: three segments
    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu", memory_gib=gib)
    snapshot = Snapshot.open(tmp_path / "index")
    assert [segment.count for segment in snapshot.segments] == [1000, 1000, 1000]
    vectors, ids = all_vectors(embeddings)
    np.testing.assert_array_equal(snapshot.ids(), ids)
    found = snapshot.nearest(vectors[::60], 10, PATCH)[1]
    assert recall(found, nearest(vectors[::60], vectors, ids, 10)) >= EXACT[index_type]


@pytest.mark.parametrize("index_type", ["ivf", "ivfpq", "rabitq"])
def test_too_few_vectors_to_train_on_are_held_flat(
    index_type, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    few = write_embeddings(tmp_path / "few", tiny_model, model_dir, (30,))
    build_index(few, tmp_path / "index", index_type=index_type, device="cpu")
    snapshot = Snapshot.open(tmp_path / "index")
    assert snapshot.segments[0].index_type in ("flat", "flat16")
    assert snapshot.nearest(all_vectors(few)[0], 1, PATCH)[1][:, 0].tolist() == list(
        range(0, 60, 2)
    )


def test_parameters_of_a_call_change_that_call_alone(embeddings: Path, tmp_path: Path) -> None:
    for index_type, few, many in (
        ("ivf", {"nprobe": 1}, {"nprobe": 10_000}),
        ("hnsw", {"ef": 1}, {"ef": 500}),
    ):
        build_index(embeddings, tmp_path / index_type, index_type=index_type, device="cpu")
        snapshot = Snapshot.open(tmp_path / index_type)
        vectors, ids = all_vectors(embeddings)
        queries = vectors[::60] + 0.2 * vectors[::-60]
        best = nearest(queries, vectors, ids, 10)
        before = snapshot.nearest(queries, 10, PATCH)[1]
        scores = [recall(snapshot.nearest(queries, 10, PATCH, **p)[1], best) for p in (few, many)]
        assert scores[0] < scores[1]
        assert scores[1] >= 0.99
        np.testing.assert_array_equal(snapshot.nearest(queries, 10, PATCH)[1], before)


def test_metadata_is_found_by_id_and_only_by_id(embeddings: Path, tmp_path: Path) -> None:
    build_index(embeddings, tmp_path / "index", device="cpu")
    snapshot = Snapshot.open(tmp_path / "index")
    assert len(snapshot) == 3000
    ids = (3998, 0, 2 << 32, (2 << 32) + 1998)
    keys = ["0-0-1999", "0-0-0", "0-2-0", "0-2-999"]
    assert [row["key"] for row in snapshot.rows(ids)] == keys
    vectors, all_ids = all_vectors(embeddings)
    np.testing.assert_array_equal(
        snapshot.vectors(ids, PATCH), vectors[[list(all_ids).index(id) for id in ids]]
    )
    for id in (-1, 1, 3999, 4000, 1 << 32, (2 << 32) + 2000):
        with pytest.raises(KeyError, match=str(id)):
            snapshot.rows([0, id])


def test_index_folder_is_all_that_a_searcher_needs(
    embeddings: Path, model_dir: Path, tmp_path: Path
) -> None:
    index, model = tmp_path / "index", tmp_path / "model"
    shutil.copytree(model_dir, model)
    build_index(embeddings, index, model, device="cpu")
    model.rename(tmp_path / "model elsewhere")
    embeddings.rename(tmp_path / "elsewhere")
    moved = index.rename(tmp_path / "moved")
    (hits,) = Searcher.load(moved).search(["a cat"], k=3)
    assert len(hits) == 3
    assert [h.similarity for h in hits] == sorted((h.similarity for h in hits), reverse=True)
    assert hits[0].columns.keys() == {"even"}
    assert json.loads((moved / "manifest.json").read_text())["format"] == 1
    assert (moved / f"patch_{PATCH}" / "image.index").is_file()


def test_auto_says_why() -> None:
    million, gib = 1_000_000, 2**30
    assert choose_index_type(1_000, 384, False)[0] == "flat"
    index_type, reason = choose_index_type(million, 384, False, 8 * gib)
    assert index_type == "ivf"
    assert "1,000,000 vectors" in reason
    assert "10 ms" in reason
    assert "\n" not in reason
    assert choose_index_type(million, 384, True, 8 * gib)[0] == "flat"
    assert choose_index_type(100_000, 384, False, 8 * gib)[0] == "flat16"
    assert choose_index_type(million, 384, False, gib)[0] == "ivfpq"  # 1.5 GiB of float32
    assert choose_index_type(million, 384, False, 8 * gib, latency_ms=2.0)[0] == "hnsw"
    for latency_ms in (0.01, 1.0, 100.0):  # FAISS cannot copy a graph to a GPU
        for count in (1_000, million, 1000 * million):
            assert choose_index_type(count, 384, True, 80 * gib, latency_ms)[0] in GPU_INDEX_TYPES


@pytest.mark.parametrize(
    "what", ["out exists", "no embeddings", "no model", "another model", "kind", "latency"]
)
def test_what_cannot_be_indexed_is_refused(
    what: str, embeddings: Path, model_dir: Path, tmp_path: Path
) -> None:
    source, out, model, message, options = embeddings, tmp_path / "index", model_dir, "", {}
    if what == "out exists":
        (out / "something").mkdir(parents=True)
        message = "exists already"
    elif what == "no embeddings":
        source, message = tmp_path / "nothing", "there is no folder"
    elif what == "no model":
        model, message = tmp_path / "nothing", "no model at"
    elif what == "latency":
        options, message = {"latency_ms": 0.0}, "latency_ms 0"
    elif what == "kind":  # rows that do not belong to the vectors
        file = next(source.glob(f"patch_{PATCH}/img_emb/*0000.npy"))
        np.save(file, np.load(file)[1:])
        message = "embed these shards again"
    else:
        manifest = json.loads((source / "manifest.json").read_text())
        manifest["image_fingerprint"] = "another"
        (source / "manifest.json").write_text(json.dumps(manifest))
        message = "another image tower"
    with pytest.raises(UsageError, match=message):
        build_index(source, out, model, **options)
    assert not (out / "manifest.json").exists()


def test_damaged_embeddings_are_told_in_one_sentence(embeddings: Path, tmp_path: Path) -> None:
    for pattern in ("manifest.json", "metadata/*0000.parquet", f"patch_{PATCH}/img_emb/*0000.npy"):
        (file,) = embeddings.glob(pattern)
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole), b"[1]"):
            file.write_bytes(damaged)
            with pytest.raises(
                UsageError, match=r"embed these shards again|no embeddings"
            ) as error:
                build_index(embeddings, tmp_path / "index", device="cpu")
            assert "\n" not in str(error.value)
            assert str(embeddings) in str(error.value)
        file.write_bytes(whole)
    build_index(embeddings, tmp_path / "index", device="cpu")


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_vectors_that_cannot_be_indexed_are_told_in_one_sentence(
    index_type, embeddings: Path, tmp_path: Path
) -> None:
    file = vector_file(embeddings, PATCH, 2)
    vectors = np.load(file)
    with_nan = vectors.copy()
    with_nan[5, 3] = np.nan
    for damaged, words in (
        (with_nan, "not finite"),
        (vectors[:, :8], "of width 8, not 32"),
        (vectors[:, 0], r"float32 of shape \(1000,\)"),
        (vectors.astype(str), "<U32 of shape"),
    ):
        np.save(file, damaged)
        with pytest.raises(UsageError, match=words):
            build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")


def test_a_damaged_footer_or_tombstone_is_told_in_one_sentence(
    embeddings: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build_index(embeddings, index, index_type="flat", device="cpu")
    delete_ids(index, [0, 2])
    (rows,), (deleted,) = index.glob("metadata/*.arrow"), index.glob("deleted_*.npy")
    for file, places in ((rows, range(-400, 0)), (deleted, range(128))):
        whole, opened = file.read_bytes(), 0
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 32
            file.write_bytes(damaged)
            with suppress(UsageError):  # some flips change nothing that is read here
                Snapshot.open(index)
                opened += 1
        assert opened < len(places) * 7 / 8
        file.write_bytes(whole)


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_damage_is_told_in_one_sentence(index_type, embeddings: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(embeddings, index, index_type=index_type, device="cpu")
    files = [index / "manifest.json", *index.glob("metadata/*.arrow"), *index.glob("patch_*/*")]
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        for damaged in (None, b"", whole[: len(whole) // 2], b"\0" * len(whole)):
            file.unlink(missing_ok=True)
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(UsageError) as error:
                Snapshot.open(index)
            assert "\n" not in str(error.value)
            assert str(index) in str(error.value)
        file.write_bytes(whole)
    assert len(Snapshot.open(index)) == 3000


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "shards", "replicas"])
def test_asking_for_a_gpu_that_is_not_there_is_an_error(
    device, embeddings: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no GPU"):
        build_index(embeddings, tmp_path / "index", device=device)


@pytest.mark.parametrize("fits_twice", [False, True])
@pytest.mark.parametrize("index_type", ["flat", "flat16", "ivf"])
def test_as_several_gpus_share_vectors_a_search_has_its_parameters(
    index_type, fits_twice: bool, embeddings: Path
) -> None:
    """By FAISS's shards and replicas of CPU indexes, which refuse what those of GPUs refuse."""
    vectors, _ = all_vectors(embeddings)
    width, halves = vectors.shape[1], np.split(vectors, 2)
    layout = gpus.spread(index_type, "auto", fits_twice)
    parts = halves if layout == "shards" else [vectors, vectors]
    shards, replicas = faiss.IndexShards(width, True, True), faiss.IndexReplicas(width, True)
    together = shards if layout == "shards" else replicas
    held = [new_index(index_type, width, len(part), part) for part in parts]
    for one, part in zip(held, parts, strict=True):  # kept, as FAISS's parts do not keep theirs
        one.index.add(part)
        together.addIndex(one.index)
    params = search_params(faiss.downcast_index(held[0].index), 1000, 1)
    found = together.search(vectors[::60], 10, params=params)[1]
    expected = nearest(vectors[::60], vectors, np.arange(len(vectors)), 10)
    assert recall(found, expected) >= EXACT[index_type]


def test_replicas_of_inverted_lists_are_refused() -> None:
    with pytest.raises(UsageError, match="replicas take no nprobe"):
        gpus.spread("ivf", "replicas", True)


@pytest.mark.parametrize("width", [256, 384, 512, 640, 768, 1024, 1152, 1280, 1536])
@pytest.mark.parametrize("index_type", ["ivf", "ivfpq"])
def test_lists_of_every_width_fit_a_gpu(index_type, width: int) -> None:
    """Look-up tables lie in 48 KiB: 256 entries of 4 bytes, or of 2, for every byte of a code."""
    code_bytes = pq_bytes(width) if index_type == "ivfpq" else 0
    float16 = gpus.float16_tables(index_type, width, code_bytes)
    assert 256 * code_bytes * (2 if float16 else 4) <= 48 * 1024
    assert float16 == (code_bytes > 48)


@pytest.mark.parametrize(
    ("index_type", "width", "code_bytes", "words"),
    [("ivfpq", 512, 128, "codes of 128 bytes"), ("ivfpq", 510, 64, "width 510"),
     ("hnsw", 512, 0, "no hnsw on GPUs"), ("rabitq", 512, 0, "no rabitq on GPUs")],
)  # fmt: skip
def test_lists_that_no_gpu_holds_are_refused(index_type, width, code_bytes, words) -> None:
    with pytest.raises(UsageError, match=words):
        gpus.float16_tables(index_type, width, code_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "shards", "replicas"])
@pytest.mark.parametrize("index_type", GPU_INDEX_TYPES)
def test_gpu_search_agrees_with_the_cpu(
    index_type, device, embeddings: Path, tmp_path: Path
) -> None:
    build_index(embeddings, tmp_path / "index", index_type=index_type)
    queries = all_vectors(embeddings)[0][::60]
    cpu = Snapshot.open(tmp_path / "index", "cpu")
    if device == "replicas" and index_type.startswith("ivf") and torch.cuda.device_count() > 1:
        with pytest.raises(UsageError, match="replicas take no nprobe"):
            Snapshot.open(tmp_path / "index", device)
        return
    gpu = Snapshot.open(tmp_path / "index", device)
    for where in (None, {"even": True}, {"key": {"in": ["0-0-2", "0-2-5"]}}):
        expected = cpu.nearest(queries, 10, PATCH, where)
        found = gpu.nearest(queries, 10, PATCH, where)
        assert recall(found[1], expected[1]) >= 0.97
        np.testing.assert_allclose(found[0], expected[0], atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", ["hnsw", "rabitq"])
def test_what_gpus_do_not_have_stays_on_the_cpu(
    index_type, embeddings: Path, tmp_path: Path
) -> None:
    build_index(embeddings, tmp_path / "index", index_type=index_type)
    assert len(Snapshot.open(tmp_path / "index", "auto")) == 3000
    with pytest.raises(UsageError, match=f"no {index_type} on GPUs"):
        Snapshot.open(tmp_path / "index", "cuda")
