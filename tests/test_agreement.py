"""How far coarse patch sizes find what a model's own size finds: measured without labels, kept with
the index, said where it is little."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from forked import run
from launcher import ROOT
from server_thread import serving

from contrastive.model.lit import LitModel
from data.shards.names import expand_shards
from retrieval.embed.bulk import embed_shards
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.build import build_index, change_index, delete_ids, index_rows, new_manifest
from retrieval.index.row_sources import RowsInMemory
from retrieval.search.agreement import (
    Agreement,
    SizeAgreement,
    agreement_file,
    read_agreement,
    write_agreement,
)
from retrieval.search.neighbours import compare_vectors, measure_agreement
from retrieval.search.searcher import Searcher

OWN, ALIKE, NEAR, NOISE = 8, 16, 24, 48  # of the tiny model, whose own size is the finest


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vectors_by_size(count: int, width: int, seed: int = 0) -> dict[int, np.ndarray]:
    """At the own size, turned, with some noise, and noise alone."""
    rng = np.random.default_rng(seed)
    own = unit(rng.standard_normal((count, width)))
    turn = np.linalg.qr(np.random.default_rng(9).standard_normal((width, width)))[0]
    near = unit(own + 0.1 * rng.standard_normal(own.shape))
    noise = unit(rng.standard_normal(own.shape))
    return {OWN: own, ALIKE: unit(own @ turn), NEAR: near, NOISE: noise}


def rows(first: int, vectors: dict[int, np.ndarray]) -> list[RowsInMemory]:
    count = len(vectors[OWN])
    ids = first + np.arange(count)
    names = [f"{number}" for number in ids]
    columns = dict.fromkeys(("key", "caption"), names) | {"shard": ["gone.tar"] * count}
    columns |= dict.fromkeys(("id", "offset", "size"), ids)
    columns = {name: columns[name] for name in METADATA_SCHEMA.names}
    return [RowsInMemory(vectors, pa.Table.from_pydict(columns, schema=METADATA_SCHEMA))]


@pytest.fixture
def index(tiny_model: LitModel, tmp_path: Path) -> Path:
    """500 images at four patch sizes."""
    vectors = vectors_by_size(500, tiny_model.embed_dim)
    manifest = new_manifest(
        tiny_model.image_fingerprint, "", tiny_model.embed_dim, sorted(vectors, reverse=True)
    )
    index_rows(tmp_path / "index", tiny_model, manifest, rows(0, vectors), "cpu")
    return tmp_path / "index"


# ---- what is measured ------------------------------------------------------------------------


def shares(own: np.ndarray, coarse: np.ndarray, depth: int) -> list[float]:
    """Per image, the share of its ten nearest by `own` among the first `depth` by `coarse`."""
    found = []
    for number in range(len(own)):
        ranked = [np.argsort(-(v @ v[number])) for v in (own, coarse)]
        best, other = ([int(i) for i in order if i != number] for order in ranked)
        found.append(len(set(best[:10]) & set(other[:depth])) / 10)
    return found


def test_neighbours_are_those_that_both_sizes_find(index: Path, tiny_model: LitModel) -> None:
    found = measure_agreement(index, tiny_model)
    assert found is not None
    assert (found.own, found.queries, found.images) == (OWN, 256, 500)
    assert found.sizes[ALIKE] == SizeAgreement(1.0, 1.0)
    assert found.sizes[NOISE].neighbours == pytest.approx(10 / 499, abs=0.02)
    assert found.sizes[NOISE].candidates == pytest.approx(200 / 499, abs=0.03)
    vectors = vectors_by_size(500, tiny_model.embed_dim)
    near = found.sizes[NEAR]
    wanted = shares(vectors[OWN], vectors[NEAR], 10)  # 256 of these 500 were asked
    assert near.neighbours == pytest.approx(np.mean(wanted), abs=0.03)
    assert near.candidates is not None
    assert 0.3 < near.neighbours < 0.9 < near.candidates


def test_candidates_that_are_most_of_the_images_tell_nothing() -> None:
    """Nor do a few images of very many, of which each stands for more than the ten nearest."""
    rng = np.random.default_rng(0)
    own, coarse = (unit(rng.standard_normal((120, 16))) for _ in range(2))
    found = compare_vectors(own, coarse, 120)
    assert found.candidates is None
    assert compare_vectors(own, coarse, 100_000).candidates is None
    nothing = Agreement(14, 120, 120, 120, 120, "", (56, 14), {56: found})
    assert nothing.line(56).endswith("that patch 14 finds")
    assert "too few to do without ranking again" in nothing.warning(56)
    assert not nothing.warning(56, refined=True)


def test_a_sample_says_what_the_whole_says() -> None:
    """Of clustered vectors, as images are."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, 32))
    own = centres[rng.integers(0, 200, 2000)] + 0.8 * rng.standard_normal((2000, 32))
    part = rng.permutation(2000)[:400]
    before = 1.0
    for noise in (0.1, 0.3, 0.6):
        coarse = unit(own + noise * rng.standard_normal(own.shape))
        whole = compare_vectors(unit(own), coarse, 2000)
        sample = compare_vectors(unit(own)[part], coarse[part], 2000)
        assert sample.neighbours == pytest.approx(whole.neighbours, abs=0.08)
        assert whole.neighbours < before
        before = whole.neighbours


def test_a_coarse_index_is_compared_with_images_encoded_for_it(
    tiny_model: LitModel, model_dir: Path, emoji_shards: Path, tmp_path: Path
) -> None:
    shards = expand_shards([f"{emoji_shards}/train/*.tar"])
    found = {}
    for name, sizes in (("coarse", [NOISE]), ("both", [NOISE, OWN])):
        embed_shards(
            tiny_model, shards, sizes, tmp_path / f"{name} embeddings", num_workers=0,
            model_dir=model_dir,
        )  # fmt: skip
        build_index(tmp_path / f"{name} embeddings", tmp_path / name, device="cpu")
        found[name] = measure_agreement(tmp_path / name, tiny_model)
    coarse, both = found["coarse"], found["both"]
    assert coarse is not None
    assert both is not None
    assert coarse.own == both.own == OWN
    assert coarse.images == coarse.queries == both.queries == both.images <= 256
    assert coarse.sizes[NOISE].neighbours == pytest.approx(both.sizes[NOISE].neighbours, abs=1e-6)
    assert 0.1 < both.sizes[NOISE].neighbours < 1
    searcher = Searcher.load(tmp_path / "coarse", tiny_model, device="cpu")
    searcher.search(["a cat"], 5, refine_patch_size=OWN, candidates=20)
    assert searcher.fine.num_encoded == 0  # what was encoded for the comparison is kept

    shutil.rmtree(tmp_path / "coarse embeddings")
    agreement_file(tmp_path / "coarse").unlink()
    (tmp_path / "coarse" / "fine.sqlite").unlink()
    short = measure_agreement(tmp_path / "coarse", tiny_model, seconds=0.0)
    assert short is not None
    assert 50 <= short.queries < coarse.queries  # no longer than it may take


# ---- what is kept ----------------------------------------------------------------------------


def test_it_is_measured_again_when_a_fifth_has_changed(index: Path, tiny_model: LitModel) -> None:
    first = measure_agreement(index, tiny_model)
    assert first is not None
    assert read_agreement(index) == first
    few = vectors_by_size(20, tiny_model.embed_dim, seed=1)
    change_index(index, list(range(10)), lambda first_id: rows(first_id, few))
    assert measure_agreement(index) == first  # of the folder alone: no model is loaded
    many = vectors_by_size(100, tiny_model.embed_dim, seed=2)
    change_index(index, [], lambda first_id: rows(first_id, many))
    again = measure_agreement(index, tiny_model)
    assert again is not None
    assert (again.count, again.images) == (610, 610)
    delete_ids(index, list(range(10, 160)))
    third = measure_agreement(index, tiny_model)
    assert third is not None
    assert third.count == 460


def test_what_is_damaged_or_of_another_tower_is_measured_again(
    index: Path, tiny_model: LitModel
) -> None:
    first = measure_agreement(index, tiny_model)
    assert first is not None
    file = agreement_file(index)
    values = json.loads(file.read_text())
    values["sizes"][f"{NOISE}"]["neighbours"] = 0.99
    for text in (json.dumps(values), "{", "[]", json.dumps({"format": 2})):
        file.unlink()
        file.write_text(text)
        assert read_agreement(index) is None
    assert measure_agreement(index, tiny_model) == first
    write_agreement(index, replace(first, image_fingerprint="another"))
    assert measure_agreement(index, tiny_model) == first


def test_few_images_say_nothing(tiny_model: LitModel, tmp_path: Path) -> None:
    vectors = vectors_by_size(40, tiny_model.embed_dim)
    manifest = new_manifest(tiny_model.image_fingerprint, "", tiny_model.embed_dim, [*vectors])
    index_rows(tmp_path / "index", tiny_model, manifest, rows(0, vectors), "cpu")
    assert measure_agreement(tmp_path / "index", tiny_model) is None
    assert Searcher.load(tmp_path / "index", tiny_model, device="cpu").warning(NOISE) == ""


# ---- what is said ----------------------------------------------------------------------------


def test_a_size_is_good_good_for_candidates_or_bad() -> None:
    sizes = {
        56: SizeAgreement(0.25, 0.95),
        32: SizeAgreement(0.7, 1.0),
        112: SizeAgreement(0.1, 0.4),
    }
    found = Agreement(16, 256, 1000, 1000, 1000, "", (112, 56, 32, 16), sizes)
    assert found.warning(32) == found.warning(16) == ""
    assert "finds 25% of the nearest images that patch 16 finds, 95% among" in found.warning(56)
    assert "ranking again at patch 16; launch/flexify.py --teacher.tower" in found.warning(56)
    assert found.warning(56, refined=True) == ""
    assert "too few even for candidates" in found.warning(112, refined=True)


def test_programs_and_the_service_say_which_size_is_bad(index: Path, tiny_model: LitModel) -> None:
    found = measure_agreement(index, tiny_model)
    assert found is not None
    searcher = Searcher.load(index, tiny_model, device="cpu")
    assert searcher.warning(NOISE) == found.warning(NOISE) != searcher.warning(OWN) == ""
    with serving({"index": searcher}) as served:
        (described,) = served.get("/v1/indices").json["indices"]
        assert described["own_patch_size"] == OWN
        by_size = {one["patch_size"]: one for one in described["patch_sizes"]}
        assert by_size[NOISE]["warning"] == found.warning(NOISE) != ""
        assert by_size[NOISE]["neighbours"] == round(found.sizes[NOISE].neighbours, 4)
        assert by_size[ALIKE]["warning"] == ""
        assert by_size[OWN]["neighbours"] is None
        for size, wanted in ((NOISE, found.warning(NOISE)), (OWN, "")):
            asked = {"vector": [1.0] * tiny_model.embed_dim, "patch_size": size}
            assert served.post("/v1/search", asked).json["warning"] == wanted
    options = ["--device", "cpu", "--patch-size", f"{NOISE}"]
    done = run(ROOT / "launch/search.py", "--index", index, "a cat", *options)
    assert done.returncode == 0, done.stderr
    assert found.warning(NOISE) in done.stderr
