"""Coarse to fine: what the fine index would say, for the price of the candidates."""

import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from contrastive.model.lit import LitModel
from data.shards.names import expand_shards
from retrieval.embed.bulk import embed_shards
from retrieval.index.build import build_index
from retrieval.search.refine import FineVectors
from retrieval.search.searcher import Searcher

COARSE, FINE = 48, 16
QUERIES = ["a cat", "rain", "a musical instrument", "something to eat"]


@pytest.fixture(scope="module")
def indexes(tiny_model: LitModel, model_dir: Path, emoji_shards: Path, tmp_path_factory) -> Path:
    """`coarse` and `fine` over the same drawings, which lie in shards of their own."""
    folder = tmp_path_factory.mktemp("refine")
    shutil.copytree(emoji_shards, folder / "shards")
    shards = expand_shards([f"{folder}/shards/*/*.tar"])
    for name, size in (("coarse", COARSE), ("fine", FINE)):
        embeddings = folder / f"{name} embeddings"
        embed_shards(tiny_model, shards, [size], embeddings, num_workers=0, model_dir=model_dir)
        build_index(embeddings, folder / name, device="cpu")
    return folder


@pytest.fixture
def coarse(indexes: Path, tiny_model: LitModel, tmp_path: Path) -> Searcher:
    """With nothing kept yet."""
    shutil.copytree(indexes / "coarse", tmp_path / "coarse")
    return Searcher.load(tmp_path / "coarse", tiny_model, device="cpu")


@pytest.fixture(scope="module")
def fine(indexes: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(indexes / "fine", tiny_model, device="cpu")


def same(found, expected) -> None:
    assert [[h.id for h in row] for row in found] == [[h.id for h in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for hit, wanted in zip(row, other, strict=True):
            assert hit.similarity == pytest.approx(wanted.similarity, abs=1e-5)


def together(coarse, fine, k: int):
    """Hits of two full searches by the similarity that both give."""
    for one, other in zip(coarse, fine, strict=True):
        similarity = {hit.id: hit.similarity for hit in other}
        both = [
            hit._replace(similarity=(2 * similarity[hit.id] + hit.similarity) / 3) for hit in one
        ]
        yield sorted(both, key=lambda hit: (-hit.similarity, hit.id))[:k]


def test_all_candidates_give_what_both_indexes_say_together(
    coarse: Searcher, fine: Searcher
) -> None:
    options = {"refine_patch_size": FINE, "candidates": len(coarse)}
    assert len(coarse) > 50
    expected = together(coarse.search(QUERIES, k=2048), fine.search(QUERIES, k=2048), 20)
    same(coarse.search(QUERIES, k=20, **options), list(expected))
    pictures = [hit.image() for hit in fine.search(QUERIES[:1], k=3)[0]]
    for size in (None, 8):  # at which the index is asked; the refinement sees queries at its own
        rough = coarse.search(pictures, k=2048, query_patch_size=size)
        expected = together(rough, fine.search(pictures, k=2048), 5)
        same(coarse.search(pictures, k=5, query_patch_size=size, **options), list(expected))


def test_few_candidates_are_ranked_by_both(coarse: Searcher, fine: Searcher) -> None:
    (candidates,) = coarse.search(["a cat"], k=10)
    (hits,) = coarse.search(["a cat"], k=4, refine_patch_size=FINE, candidates=10)
    (expected,) = together([candidates], fine.search(["a cat"], k=2048), 4)
    same([hits], [expected])


def test_fine_vectors_are_computed_once_and_kept(
    coarse: Searcher, tiny_model: LitModel, tmp_path: Path
) -> None:
    options = {"k": 5, "refine_patch_size": FINE, "candidates": 12}
    first = coarse.search(QUERIES, **options)
    encoded = coarse.fine.num_encoded
    assert 12 <= encoded <= 48
    assert coarse.search(QUERIES, **options) == first
    assert coarse.fine.num_encoded == encoded
    again = Searcher.load(tmp_path / "coarse", tiny_model, device="cpu")  # another program
    same(again.search(QUERIES, **options), first)
    assert again.fine.num_encoded == 0


def test_a_patch_size_that_the_index_holds_needs_no_pictures(
    indexes: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    shards = expand_shards([f"{indexes}/shards/*/*.tar"])
    embed_shards(
        tiny_model, shards, [COARSE, FINE], tmp_path / "both", num_workers=0,
        model_dir=model_dir,
    )  # fmt: skip
    build_index(tmp_path / "both", tmp_path / "index", index_type="flat", device="cpu")
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    found = searcher.search(
        QUERIES, k=9, patch_size=COARSE, refine_patch_size=FINE, candidates=len(searcher)
    )
    whole = [searcher.search(QUERIES, k=2048, patch_size=size) for size in (COARSE, FINE)]
    same(found, list(together(*whole, 9)))
    assert searcher.fine.num_encoded == 0


def test_threads_that_ask_at_once_share_the_work(coarse: Searcher) -> None:
    options = {"k": 5, "refine_patch_size": FINE, "candidates": 30}
    results: list = [None] * 8

    def ask(number: int) -> None:
        results[number] = coarse.search(QUERIES[:1], **options)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == results[0] for result in results)
    assert results[0] is not None
    assert coarse.fine.num_encoded == 30


def test_pictures_that_are_gone_come_last(
    coarse: Searcher, indexes: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    (before,) = coarse.search(["a cat"], k=20)
    lost = {before[0].shard}
    moved = indexes / "moved.tar"
    Path(before[0].shard).rename(moved)
    try:
        (hits,) = coarse.search(["a cat"], k=20, refine_patch_size=FINE, candidates=20)
    finally:
        moved.rename(before[0].shard)
    assert {h.id for h in hits} == {h.id for h in before}
    gone = [h.shard in lost for h in hits]
    assert gone == sorted(gone)
    assert any(gone)
    kept = [h for h in before if h.shard in lost]
    assert [h.id for h in hits if h.shard in lost] == [h.id for h in kept]


def test_what_is_kept_is_bounded_and_survives_damage(
    coarse: Searcher, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    hits = coarse.search(["a cat"], k=30)[0]
    locations = {hit.id: hit.location for hit in hits}
    file = tmp_path / "fine.sqlite"
    vectors = FineVectors(tiny_model, file, max_kept=10)
    expected = vectors.get(locations, FINE)
    assert len(expected) == 30
    count = sqlite3.connect(file).execute("SELECT count(*) FROM fine").fetchone()[0]
    assert count == 10

    del vectors
    file.write_bytes(b"nonsense" * 1000)
    vectors = FineVectors(tiny_model, file)
    for id, vector in vectors.get(locations, FINE).items():
        np.testing.assert_allclose(vector, expected[id], atol=1e-6)

    few = dict([*locations.items()][:3])
    data = bytearray(file.read_bytes())
    at = data.index(expected[hits[0].id].tobytes()[:64])
    data[at + 2] ^= 1
    file.write_bytes(data)  # a flipped bit: that vector is computed again
    again = FineVectors(tiny_model, file)
    found = again.get(few, FINE)
    assert again.num_encoded == 1
    for id, vector in found.items():
        np.testing.assert_allclose(vector, expected[id], atol=1e-6)

    other = LitModel.from_pretrained(model_dir)
    other.feature_mean += 0.1
    changed = FineVectors(other, file)  # another tower's are not taken for its own
    first = hits[0].id
    other_vectors = changed.get({first: locations[first]}, FINE)
    assert abs(other_vectors[first] - expected[first]).max() > 1e-3
    nowhere = FineVectors(tiny_model, tmp_path / "no folder" / "fine.sqlite")
    assert len(nowhere.get(dict(list(locations.items())[:3]), FINE)) == 3


def test_an_index_built_anew_under_its_name_has_none_of_the_old_vectors(
    coarse: Searcher, tiny_model: LitModel, tmp_path: Path
) -> None:
    first, second = (hit.location for hit in coarse.search(["a cat"], k=2)[0])
    vectors = FineVectors(tiny_model, tmp_path / "fine.sqlite")
    before = vectors.get({0: first}, FINE)[0]
    (tmp_path / "fine.sqlite").unlink()
    after = vectors.get({0: second}, FINE)[0]
    np.testing.assert_array_equal(after, vectors.get({1: second}, FINE)[1])
    assert abs(after - before).max() > 1e-3
    assert vectors.num_encoded == 3
