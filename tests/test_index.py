"""Indexes: exact, approximate, found again by id, refused in one sentence when they cannot be."""

import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.lit import LitModel
from data.errors import UsageError
from retrieval.index import build_index, choose_kind
from retrieval.partitions import METADATA_SCHEMA, vector_file
from retrieval.search import Metadata, Searcher

PATCH = 28


@pytest.fixture
def model_dir(tiny_model: LitModel, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def embeddings(tiny_model: LitModel, model_dir: Path, tmp_path: Path) -> Path:
    """3,000 clustered unit vectors in partitions of 2,000, none and 1,000; ids with gaps."""
    rng = np.random.default_rng(0)
    width, folder = tiny_model.embed_dim, tmp_path / "embeddings"
    centres = rng.standard_normal((40, width))
    counts = (2000, 0, 1000)
    for number, count in enumerate(counts):
        vectors = centres[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, width))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        file = vector_file(folder, PATCH, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, vectors.astype(np.float32))
        ids = (number << 32) + 2 * np.arange(count)
        names = [f"{number}-{row}" for row in range(count)]
        columns = {
            "id": ids,
            "key": names,
            "caption": names,
            "shard": ["gone.tar"] * count,
            "offset": ids,
            "size": ids,
        }
        (folder / "metadata").mkdir(exist_ok=True)
        table = pa.Table.from_pydict(columns, schema=METADATA_SCHEMA)
        pq.write_table(table, folder / "metadata" / f"metadata_{number:04d}.parquet")
    manifest = {
        "format": 1,
        "image_fingerprint": tiny_model.image_fingerprint,
        "text_fingerprint": tiny_model.text_fingerprint,
        "model": str(model_dir),
        "width": width,
        "patch_sizes": [PATCH],
        "count": sum(counts),
        "partitions": [{"shard": "gone.tar", "count": count} for count in counts],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def all_vectors(embeddings: Path) -> tuple[np.ndarray, np.ndarray]:
    vectors = [np.load(vector_file(embeddings, PATCH, n)) for n in range(3)]
    ids = [pq.read_table(f)["id"].to_numpy() for f in sorted(embeddings.rglob("*.parquet"))]
    return np.concatenate(vectors), np.concatenate(ids)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_index_finds_what_an_exact_scan_finds(
    kind, tiny_model: LitModel, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.index.BLOCK_ROWS", 700)  # several blocks a partition
    build_index(embeddings, tmp_path / "index", kind=kind, device="cpu")
    searcher = Searcher.load(tmp_path / "index", tiny_model)
    vectors, ids = all_vectors(embeddings)
    queries = vectors[::60]
    best = ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :10]]
    similarities, found = searcher.nearest(queries, 10, searcher.index(PATCH))
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)])
    assert overlap >= (1.0 if kind == "flat" else 0.9)
    assert (found[:, 0] == ids[::60]).all()
    np.testing.assert_allclose(similarities[:, 0], 1, atol=1e-5)


def test_metadata_is_found_by_id_and_only_by_id(embeddings: Path, tmp_path: Path) -> None:
    build_index(embeddings, tmp_path / "index", device="cpu")
    metadata = Metadata(tmp_path / "index" / "metadata")
    assert len(metadata) == 3000
    for id, key in ((0, "0-0"), (3998, "0-1999"), (2 << 32, "2-0"), ((2 << 32) + 1998, "2-999")):
        assert metadata.row(id)["key"] == key
    for id in (-1, 1, 3999, 4000, 1 << 32, (2 << 32) + 2000):
        with pytest.raises(KeyError):
            metadata.row(id)


def test_index_folder_is_all_that_a_searcher_needs(embeddings: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build_index(embeddings, index, device="cpu")
    embeddings.rename(tmp_path / "elsewhere")
    (tmp_path / "model").rename(tmp_path / "model elsewhere")
    moved = index.rename(tmp_path / "moved")
    (hits,) = Searcher.load(moved).search(["a cat"], k=3)
    assert len(hits) == 3
    assert [h.similarity for h in hits] == sorted((h.similarity for h in hits), reverse=True)
    assert json.loads((moved / "manifest.json").read_text())["format"] == 1


def test_auto_says_why() -> None:
    assert choose_kind(1_000, 384, False)[0] == "flat"
    kind, reason = choose_kind(1_000_000, 384, False)
    assert kind == "ivf"
    assert "1,000,000 vectors" in reason
    assert choose_kind(1_000_000, 384, True)[0] == "flat"
    assert "\n" not in reason


@pytest.mark.parametrize("what", ["out exists", "no embeddings", "no model", "another model"])
def test_what_cannot_be_indexed_is_refused(
    what: str, tiny_model: LitModel, embeddings: Path, model_dir: Path, tmp_path: Path
) -> None:
    source, out, model, message = embeddings, tmp_path / "index", model_dir, ""
    if what == "out exists":
        (out / "something").mkdir(parents=True)
        message = "exists already"
    elif what == "no embeddings":
        source, message = tmp_path / "nothing", "holds no embeddings"
    elif what == "no model":
        model, message = tmp_path / "nothing", "no model at"
    else:
        manifest = json.loads((source / "manifest.json").read_text())
        manifest["image_fingerprint"] = "another"
        (source / "manifest.json").write_text(json.dumps(manifest))
        message = "another image tower"
    with pytest.raises(UsageError, match=message):
        build_index(source, out, model)
    assert not (out / "manifest.json").exists()


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_an_error(embeddings: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no GPU"):
        build_index(embeddings, tmp_path / "index", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_gpu_search_agrees_with_the_cpu(
    kind, tiny_model: LitModel, embeddings: Path, tmp_path: Path
) -> None:
    if not faiss.get_num_gpus():
        pytest.skip("needs a GPU")
    build_index(embeddings, tmp_path / "index", kind=kind)
    queries = all_vectors(embeddings)[0][::60]
    found = {}
    for device in ("cpu", "cuda"):
        searcher = Searcher(tmp_path / "index", tiny_model, device)
        found[device] = searcher.nearest(queries, 10, searcher.index(PATCH))
    np.testing.assert_allclose(found["cpu"][0], found["cuda"][0], atol=1e-3)
