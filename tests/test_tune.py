"""How far an index looks is measured by captions where there are some, and kept with it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from index_maker import PATCH, all_vectors, clustered, nearest, recall, write_embeddings

from contrastive.model.lit import LitModel
from retrieval.index import create
from retrieval.index import tune as tune_module
from retrieval.index.build import build_index, compact_index, delete_ids
from retrieval.index.choose import RERANKED
from retrieval.index.config import K_FACTOR
from retrieval.index.create import new_index
from retrieval.index.faiss_setup import faiss
from retrieval.index.manifest import read_index_manifest
from retrieval.index.nearest import search_params
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import RECALL, Trial, caption_queries, draw_captions, overlap, tune


def rows(captions: list[str | None]) -> RowsInMemory:
    return RowsInMemory({}, pa.table({"caption": pa.array(captions, pa.string())}))


@pytest.mark.parametrize("index_type", sorted(RERANKED))
def test_as_many_are_ranked_again_as_the_recall_needs(
    index_type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors without structure, of short codes: these tell little, and ten times k are too few."""
    monkeypatch.setattr(create, "pq_bytes", lambda width: width // 8)
    draw = np.random.default_rng(0)
    vectors, queries = (draw.standard_normal((n, 48)).astype(np.float32) for n in (2000, 64))
    index = new_index(index_type, 48, len(vectors), vectors)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    best = nearest(queries, vectors, np.arange(len(vectors)), 10)
    inner = faiss.downcast_index(index.index)
    tuned = tune(inner, Trial(queries, best), latency_ms=1000.0)
    assert tuned.k_factor > K_FACTOR
    assert tuned.recall >= RECALL
    params = search_params(inner, tuned.nprobe, tuned.ef, k_factor=K_FACTOR)
    assert overlap(inner.search(queries, 10, params=params)[1], best) < RECALL


def test_a_search_ranks_as_many_again_as_was_measured(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = write_embeddings(tmp_path / "emb", tiny_model, model_dir, (2000,))
    build_index(embeddings, tmp_path / "index", index_type="ivfpq", device="cpu")
    asked = []
    search = faiss.IndexRefine.search
    monkeypatch.setattr(
        faiss.IndexRefine,
        "search",
        lambda *args, params, **kwargs: (
            asked.append(params.k_factor) or search(*args, params=params, **kwargs)
        ),
    )
    snapshot = Snapshot.open(tmp_path / "index")
    snapshot.nearest(clustered(1, snapshot.width, seed=9), 10, PATCH)
    assert asked == [snapshot.segments[0].tuning(PATCH).k_factor]


@pytest.mark.parametrize("index_type", ["ivf", "hnsw"])
def test_texts_are_found_by_an_index_of_their_captions(
    index_type, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    """Images lie around forty centres, and the texts of a model that was not trained elsewhere."""
    embeddings = write_embeddings(tmp_path / "emb", tiny_model, model_dir, (2000,))
    index = tmp_path / "index"
    build_index(embeddings, index, index_type=index_type, device="cpu", latency_ms=1000.0)
    tuning = Snapshot.open(index).segments[0].tuning(PATCH)
    assert tuning.captions == tune_module.NUM_CAPTIONS
    assert tuning.recall >= RECALL
    assert f"nearest to {tuning.captions} captions" in read_index_manifest(index).tuning_line(PATCH)
    vectors, ids = all_vectors(embeddings)
    queries = tiny_model.encode_text([f"7-3-{number}" for number in range(64)]).numpy()
    found = Snapshot.open(index).nearest(queries, 10, PATCH)[1]
    assert recall(found, nearest(queries, vectors, ids, 10)) >= 0.95

    delete_ids(index, ids[:100].tolist())
    compact_index(index, "cpu")  # reads the model in the index
    assert Snapshot.open(index).segments[0].tuning(PATCH).captions == tuning.captions


def test_without_captions_or_model_it_is_said_that_texts_may_find_fewer(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert caption_queries([rows(["one", "two"])], tiny_model, "cpu", tiny_model.embed_dim) is None
    many = rows([f"caption {number}" for number in range(100)])
    assert caption_queries([many], tmp_path, "cpu", tiny_model.embed_dim) is None
    assert caption_queries([many], tiny_model, "cpu", 8) is None
    monkeypatch.setattr(tune_module, "MIN_CAPTIONS", 10_000)
    embeddings = write_embeddings(tmp_path / "emb", tiny_model, model_dir, (1000,))
    build_index(embeddings, tmp_path / "index", index_type="ivf", device="cpu")
    assert Snapshot.open(tmp_path / "index").segments[0].tuning(PATCH).captions == 0
    line = read_index_manifest(tmp_path / "index").tuning_line(PATCH)
    assert "texts may find fewer" in line
    assert "\n" not in line


def test_captions_are_drawn_from_all_over_once_each() -> None:
    named = [f"caption {number}" for number in range(4000)]
    sources = [rows([*named[i : i + 500], "", " ", None, "again"]) for i in range(0, 4000, 500)]
    drawn = draw_captions(sources)
    assert drawn == draw_captions(sources)
    assert len(drawn) == len(set(drawn)) == tune_module.NUM_CAPTIONS
    assert set(drawn) <= {*named, "again"}
    parts = {int(caption.split()[1]) // 500 for caption in drawn if caption != "again"}
    assert parts == set(range(8))
    assert draw_captions([]) == draw_captions([rows(["", None])]) == []
