"""Milvus Lite as published (in .venv-interop/milvus) holds an index as a folder does: one suite
over both, and what only Milvus can do wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_maker import PATCH, all_vectors, clustered, nearest, write_embeddings
from milvus_lite_server import LiteServer
from server_thread import serving

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval import Searcher, add_embeddings, build_index, delete_ids
from retrieval.index.filters import matching
from retrieval.index_interface import IndexUnavailable
from retrieval.milvus import catalogue, client, place
from retrieval.milvus.address import parse_address
from retrieval.milvus.catalogue import TEXT, Catalogue
from retrieval.milvus.client import MilvusConnection
from retrieval.milvus.write import add_to_milvus, build_in_milvus, delete_in_milvus

pytestmark = pytest.mark.interop

COUNTS = (90, 60)
STRANGE = (
    'a "quoted" text', "it's 100%", "100 per_cent", "back\\slash", "two\nlines\tand a tab",
    '" or id >= 0 or caption == "', '\\" or id >= 0 or "', "Straße Café ﬁne", "猫が好き", "", "%",
    "_",
)  # fmt: skip


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    server = LiteServer(tmp_path_factory.mktemp("milvus") / "data")
    yield server
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXILIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass
class Backend:
    """Makes and changes indexes in one place."""

    name: str
    where: Callable[[str], str]

    def build(self, embeddings: Path, name: str, index_type: Any = "flat") -> str:
        place = self.where(name)
        if self.name == "milvus":
            build_in_milvus(embeddings, parse_address(place), index_type=index_type)
        else:
            build_index(embeddings, place, index_type=index_type, device="cpu")
        return place

    def add(self, place: str, embeddings: Path) -> int:
        if self.name == "milvus":
            return add_to_milvus(parse_address(place), embeddings)
        return add_embeddings(place, embeddings)

    def delete(self, place: str, ids: Sequence[int]) -> int:
        if self.name == "milvus":
            return delete_in_milvus(parse_address(place), ids)
        return delete_ids(place, ids)


@pytest.fixture(scope="module", params=["folder", "milvus"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    if request.param == "milvus":
        return Backend("milvus", request.getfixturevalue("lite").address)
    folder = tmp_path_factory.mktemp("folders")
    return Backend("folder", lambda name: str(folder / name))


@pytest.fixture(scope="module")
def embeddings(
    tiny_model: LitModel, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Vectors with columns of every kind, and texts that mean something to expressions."""
    folder = tmp_path_factory.mktemp("columns") / "emb"
    write_embeddings(folder, tiny_model, model_dir, COUNTS)
    rng = np.random.default_rng(0)
    for file in sorted(folder.glob("metadata/*.parquet")):
        table = pq.read_table(file)
        count = len(table)
        captions = [STRANGE[row % len(STRANGE)] for row in range(count)]
        table = table.set_column(table.schema.get_field_index("caption"), "caption", [captions])
        some = rng.random(count) < 0.2
        columns = {
            "ratio": pa.array(rng.normal(size=count), pa.float32(), mask=some),
            "taken": pa.array(np.arange(count) * 86_400_000_000, pa.timestamp("us"), mask=some),
            "day": pa.array(np.arange(count, dtype=np.int32), pa.date32()),
            "in": pa.array([STRANGE[-row % len(STRANGE)] for row in range(count)], mask=some),
            "Größe": pa.array(rng.integers(-5, 5, count), pa.int16(), mask=some),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        pq.write_table(table, file)
    return folder


@pytest.fixture(scope="module")
def rows(embeddings: Path) -> pa.Table:
    files = sorted(embeddings.glob("metadata/*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


@pytest.fixture(scope="module")
def searcher(backend: Backend, embeddings: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(backend.build(embeddings, "columns"), tiny_model, device="cpu")


# ---- both ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index_type", ["flat", "hnsw", "ivf"])
def test_the_nearest_are_found(
    backend: Backend, embeddings: Path, tiny_model: LitModel, index_type: str
) -> None:
    place = backend.build(embeddings, index_type, index_type)
    searcher = Searcher.load(place, tiny_model, device="cpu")
    queries = clustered(7, tiny_model.embed_dim, seed=9)
    vectors, ids = all_vectors(embeddings)
    found = searcher.search_embeds(queries, k=5, nprobe=64)
    assert [[hit.id for hit in hits] for hits in found] == nearest(
        queries, vectors, ids, 5
    ).tolist()
    cosines = np.sort(queries @ vectors.T)[:, ::-1][:, :5]
    np.testing.assert_allclose([[h.similarity for h in hits] for hits in found], cosines, atol=1e-5)


FILTERS: list[Any] = [
    {}, {"size": {">": 20, "<=": 90}}, {"size": {">": 20.5}}, {"size": {"<": 1e30}}, {"size": 4.5},
    {"id": {"in": [0, 2, 1 << 32, 77]}}, {"id": {"in": []}}, {"even": True}, {"even": {"<": True}},
    {"ratio": {">=": 0.25}}, {"not": {"ratio": {">=": 0.25}}}, {"ratio": {"!=": 0.0}},
    {"taken": {">=": "1970-02-01", "<": "1970-03-01T12:00:00"}}, {"day": {"<": "1970-01-20"}},
    {"not": {"taken": {">=": "1970-02-01"}}}, {"Größe": {">": -1.5}}, {"not": {"Größe": 2}},
    {"in": {"in": ["", None]}}, {"not": {"in": {"in": ["%", None]}}}, {"in": {"!=": "%"}},
    {"any": [{"even": False}, {"all": [{"in": "_"}, {"not": {"ratio": {"<": 0}}}]}]},
    {"not": {"any": [{"in": {"contains": "a"}}, {"not": {"even": True}}]}},
    {"caption": {"contains": "STRASSE cafe fine"}}, {"caption": {"contains": "猫"}},
    {"caption": {"contains": ""}}, {"caption": {"<": "b"}}, {"not": {"in": {"contains": "_"}}},
    *({"caption": text} for text in STRANGE), *({"in": {"contains": text}} for text in STRANGE),
]  # fmt: skip


def test_filters_let_the_same_rows_through(searcher: Searcher, rows: pa.Table) -> None:
    state, ids = searcher.snapshot, rows["id"].to_numpy()
    for where in FILTERS:
        wanted = ids[matching(rows, where)].tolist()
        assert state.ids(where).tolist() == wanted, where
        assert state.ids(where, 3).tolist() == wanted[:3]
    assert state.count_matching(FILTERS[1]) == len(state.ids(FILTERS[1])) > 0
    query = clustered(1, state.width, seed=5)
    (hits,) = searcher.search_embeds(query, k=50, where={"caption": {"contains": "100"}})
    assert {hit.id for hit in hits} == set(state.ids({"caption": {"contains": "100"}}).tolist())


@pytest.mark.parametrize(
    "where",
    [
        {"nope": 1}, {"size": "many"}, {"size": {"contains": "1"}}, {"key": {"like": "a"}},
        {"any": []}, {"id = 0 or size": 1}, {"key": "\ud800"}, {"size": {"in": "12"}},
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(searcher: Searcher, where: Any) -> None:
    with pytest.raises(UsageError, match="where"):
        searcher.search_embeds(clustered(1, searcher.snapshot.width), where=where)


def test_metadata_and_vectors_come_back(
    searcher: Searcher, rows: pa.Table, embeddings: Path
) -> None:
    ids = rows["id"].to_pylist()[::-7]
    wanted = {row["id"]: row for row in rows.to_pylist()}
    found = searcher.rows(ids)
    assert [{**wanted[id], "digest": None} for id in ids] == found
    vectors, known = all_vectors(embeddings)
    held = searcher.vectors(ids, PATCH)
    np.testing.assert_array_equal(held, vectors[np.searchsorted(known, ids)])
    with pytest.raises(KeyError):
        searcher.rows([ids[0], 1])
    with pytest.raises(KeyError):
        searcher.vectors([1], PATCH)
    assert [*searcher.snapshot.known_vectors([1, ids[0]], PATCH)] == [ids[0]]
    drawn = searcher.snapshot.draw(20)
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(rows["id"].to_pylist())
    (captions,) = (searcher.snapshot.column_values("in").to_pylist(),)
    assert sorted(captions) == sorted(rows["in"].drop_null().to_pylist())


def test_additions_and_deletions_are_picked_up(
    backend: Backend, embeddings: Path, tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    place = backend.build(write_embeddings(tmp_path / "a", tiny_model, model_dir, [40]), "changed")
    searcher = Searcher.load(place, tiny_model, device="cpu")
    more = write_embeddings(tmp_path / "b", tiny_model, model_dir, [30, 20], seed=3)
    assert backend.add(place, more) == 50
    with pytest.raises(UsageError, match="already"):
        backend.add(place, more)
    assert searcher.reload()
    assert len(searcher) == 90
    vectors, ids = all_vectors(more)
    first = searcher.snapshot.ids()[40]
    (hits,) = searcher.search_embeds(vectors[:1], k=3)
    assert hits[0].id == first + ids[0]
    gone = [int(first), int(first) + 2, 0, 1]
    assert backend.delete(place, gone) == 3
    assert backend.delete(place, gone) == 0
    assert searcher.reload()
    assert len(searcher) == len(searcher.snapshot.ids()) == 87
    (hits,) = searcher.search_embeds(vectors[:1], k=90)
    assert len(hits) == 87
    assert not {hit.id for hit in hits} & set(gone)
    highest = int(searcher.snapshot.ids()[-1])
    backend.delete(place, [highest])
    assert backend.add(place, write_embeddings(tmp_path / "c", tiny_model, model_dir, [5], 4)) == 5
    assert searcher.reload()
    assert not searcher.reload()
    assert highest not in searcher.snapshot.ids()  # ids are never reused


def test_an_index_of_another_model_is_refused(
    backend: Backend, embeddings: Path, model_dir: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    place = backend.build(write_embeddings(tmp_path / "a", tiny_model, model_dir, [40]), "other")
    strange = write_embeddings(tmp_path / "b", tiny_model, model_dir, [10], seed=2)
    manifest = json.loads((strange / "manifest.json").read_text())
    (strange / "manifest.json").write_text(json.dumps({**manifest, "image_fingerprint": "x"}))
    with pytest.raises(UsageError, match="another image tower"):
        backend.add(place, strange)
    with pytest.raises(UsageError, match="exists already"):
        backend.build(embeddings, "other")
    assert len(Searcher.load(place, tiny_model, device="cpu")) == 40


# ---- both, through the service and coarse to fine ------------------------------------------


@pytest.fixture(scope="module")
def drawings(backend: Backend, emoji_index: Path, tiny_model: LitModel) -> Searcher:
    place = backend.build(emoji_index.parent / "emb", "drawings")
    return Searcher.load(place, tiny_model, device="cpu")


@pytest.fixture(scope="module")
def expected(emoji_index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(emoji_index, tiny_model, device="cpu")


def test_words_images_and_refinement_find_the_same(drawings: Searcher, expected: Searcher) -> None:
    picture = expected.search(["rain"], k=3)[0][2].image()
    coarse, fine = sorted(expected.patch_sizes, reverse=True)
    asked: list[dict[str, Any]] = [
        {"queries": ["a happy cat", picture], "k": 9},
        {"queries": "rain", "patch_size": coarse, "where": {"caption": {"contains": "a"}}},
        {"queries": picture, "patch_size": coarse, "refine_patch_size": fine, "candidates": 30},
        {"queries": "rain", "refine_patch_size": 24, "candidates": 10},  # not in the index
    ]
    for one in asked:
        assert [[(h.key, h.shard, h.caption, h.columns) for h in hits] for hits in drawings.search(
            **one
        )] == [[(h.key, h.shard, h.caption, h.columns) for h in hits] for hits in expected.search(
            **one
        )]  # fmt: skip


def test_the_service_answers_the_same(drawings: Searcher, expected: Searcher) -> None:
    bodies = [
        {"text": "rain", "k": 7, "offset": 3}, {"text": "rain", "k": 7, "deduplicate": True},
        {"mix": [{"text": "rain", "weight": 1}, {"id": 4, "weight": -0.5}], "k": 5},
        {"text": "sun", "where": {"caption": {"contains": "A"}}},
        {"text": "sun", "refine_patch_size": min(expected.patch_sizes),
         "index_patch_size": max(expected.patch_sizes)},
    ]  # fmt: skip
    with serving({"one": drawings, "other": expected}) as served:
        for body in bodies:
            one, other = (served.post("/v1/search", {**body, "index": n}) for n in ("one", "other"))
            assert one.status == other.status == 200, one.body
            hits, wanted = one.json["hits"], other.json["hits"]
            assert [hit["id"] for hit in hits] == [hit["id"] for hit in wanted]
            assert hits
        for path in ("columns", "images?k=5&offset=3", "scale"):
            one, other = (served.get(f"/v1/indices/{n}/{path}") for n in ("one", "other"))
            assert one.status == 200, one.body
            same = json.loads(one.body.replace(b'"one"', b'"other"').replace(b"/one/", b"/other/"))
            if path != "scale":
                assert same == other.json
        assert len(served.get("/v1/indices/one/sample?n=5").json["hits"]) == 5
        id = served.get("/v1/indices/one/sample?n=1").json["hits"][0]["id"]
        assert served.get(f"/v1/images/one/{id}").status == 200
        assert served.get(f"/v1/images/one/{id + 10**9}").status == 404
        counts = {
            index["name"]: index["count"] for index in served.get("/v1/indices").json["indices"]
        }
        assert counts["one"] == counts["other"] > 0


# ---- Milvus alone --------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, tiny_model: LitModel, model_dir: Path) -> Iterator[tuple[LiteServer, str]]:
    """A server of the test's own, and an index of 40 in it."""
    server = LiteServer(tmp_path / "data")
    address = server.address("photos")
    emb = write_embeddings(tmp_path / "emb", tiny_model, model_dir, [40])
    build_in_milvus(emb, parse_address(address))
    yield server, address
    server.stop()


def test_an_index_outlives_its_server_and_a_stop_is_said(
    own: tuple[LiteServer, str], tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, address = own
    searcher = Searcher.load(address, tiny_model, device="cpu")
    query = clustered(1, tiny_model.embed_dim)
    before = searcher.search_embeds(query, k=5)
    body = {"vector": query[0].tolist(), "k": 5}
    with serving({"photos": searcher}) as served:
        monkeypatch.setattr(client, "SEARCH_S", 1.0)
        server.hold(True)
        slow = served.post("/v1/search", body)
        server.hold(False)
        assert (slow.status, "within 1 s" in slow.json["error"]) == (503, True)
        server.kill()
        down = served.post("/v1/search", body)
        assert (down.status, "is it running?" in down.json["error"]) == (503, True)
        with pytest.raises(IndexUnavailable, match="is it running"):
            delete_in_milvus(parse_address(address), [0])
        server.start()
        deadline = time.monotonic() + 30
        while (again := served.post("/v1/search", body)).status == 503:
            assert time.monotonic() < deadline, again.body
            time.sleep(0.2)
        assert [hit["id"] for hit in again.json["hits"]] == [hit.id for hit in before[0]]


def test_an_interrupted_push_loses_and_doubles_nothing(
    own: tuple[LiteServer, str],
    tiny_model: LitModel,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, address = own
    place = parse_address(address)
    more = write_embeddings(tmp_path / "more", tiny_model, model_dir, [30, 30], seed=3)
    fresh = parse_address(server.address("fresh"))
    written = MilvusConnection.write

    def fail(self: MilvusConnection, collection: str, rows: Any) -> None:
        if collection.endswith(f"patch_{PATCH}") and rows[0]["key"].startswith("3-1"):
            raise IndexUnavailable("gone")
        written(self, collection, rows)

    searcher = Searcher.load(address, tiny_model, device="cpu")
    monkeypatch.setattr(MilvusConnection, "write", fail)
    with pytest.raises(IndexUnavailable):
        add_to_milvus(place, more)
    with pytest.raises(IndexUnavailable):
        build_in_milvus(more, fresh)
    monkeypatch.undo()
    assert MilvusConnection(place).count(place.collection(PATCH)) == 70
    for one in (searcher, Searcher.load(address, tiny_model, device="cpu")):
        state, (vector, *_) = one.snapshot, all_vectors(more)[0]
        assert len(one) == len(state.ids()) == len(state.column_values("key")) == 40
        for _ in range(2):
            (hits,) = one.search_embeds(vector[None], k=70)
            assert [hit.id for hit in sorted(hits)] == state.ids().tolist()
        assert state.count_matching({"even": True}) == 20
        beyond = state.manifest.next_id
        assert MilvusConnection(place).get(place.collection(PATCH), [beyond], [])
        assert not state.known_vectors([beyond], PATCH)
        with pytest.raises(KeyError):
            state.rows([beyond])
    with pytest.raises(UsageError, match="not complete"):
        Searcher.load(str(fresh), tiny_model, device="cpu")
    assert add_to_milvus(place, more) == 60
    build_in_milvus(more, fresh)
    assert searcher.reload()
    assert len(searcher) == len(searcher.snapshot.ids()) == 100
    assert len(Searcher.load(str(fresh), tiny_model, device="cpu").snapshot.ids()) == 60


def test_one_program_changes_an_index_at_a_time(own: tuple[LiteServer, str]) -> None:
    place = parse_address(own[1])
    catalogue = Catalogue.open(MilvusConnection(place), place)
    with (
        catalogue.only_writer(),
        pytest.raises(UsageError, match="another program is changing"),
    ):
        delete_in_milvus(place, [0])
    assert delete_in_milvus(place, [0]) == 1


def test_a_writer_keeps_its_lease_or_changes_nothing(
    own: tuple[LiteServer, str],
    tiny_model: LitModel,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = parse_address(own[1])
    connection = MilvusConnection(address)

    def leases() -> dict[int, str]:
        rows = connection.iterate(address.name, "id > 0", [TEXT], strong=True)
        return {row["id"]: row[TEXT] for batch in rows for row in batch}

    def be_slow(self: MilvusConnection, collection: str) -> None:
        before, deadline = leases(), time.monotonic() + 30
        while leases() == before:
            assert time.monotonic() < deadline, "nothing is renewed"

    def lose(self: MilvusConnection, collection: str) -> None:
        connection.delete(address.name, [*leases()])

    monkeypatch.setattr(catalogue, "RENEW_S", 0.05)
    monkeypatch.setattr(MilvusConnection, "flush", be_slow)
    add_to_milvus(address, write_embeddings(tmp_path / "slow", tiny_model, model_dir, [5], 1))
    monkeypatch.setattr(catalogue, "RENEW_S", 300.0)
    monkeypatch.setattr(MilvusConnection, "flush", lose)
    lost = write_embeddings(tmp_path / "lost", tiny_model, model_dir, [5], 2)
    with pytest.raises(UsageError, match="another program may have begun"):
        add_to_milvus(address, lost)
    monkeypatch.setattr(catalogue, "LEASE_S", client.WRITE_S)  # what it writes may come too late
    monkeypatch.setattr(MilvusConnection, "write", lambda *_: None)
    with pytest.raises(UsageError, match="another program may have begun"):
        add_to_milvus(address, lost)
    monkeypatch.undo()
    assert len(Searcher.load(str(address), tiny_model, device="cpu").snapshot.ids()) == 45


def test_a_deletion_that_was_interrupted_is_counted_by_the_next(
    own: tuple[LiteServer, str], tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = parse_address(own[1])
    put = Catalogue._put

    def fail(self: Catalogue, id: int, text: str) -> None:
        if id == 0:
            raise IndexUnavailable("gone")
        put(self, id, text)

    searcher = Searcher.load(str(address), tiny_model, device="cpu")
    monkeypatch.setattr(Catalogue, "_put", fail)
    with pytest.raises(IndexUnavailable):
        delete_in_milvus(address, [0, 2])
    monkeypatch.undo()
    assert delete_in_milvus(address, [0, 2]) == 0
    assert searcher.reload()
    assert len(searcher) == len(searcher.snapshot.ids()) == 38
    delete_in_milvus(address, [0, 2])
    assert not searcher.reload()


def test_an_index_built_again_under_its_name_is_another(
    own: tuple[LiteServer, str], tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    text = own[1]
    address = parse_address(text)
    searcher = Searcher.load(text, tiny_model, device="cpu")
    before, kept = searcher.snapshot, searcher.folder
    query = clustered(1, tiny_model.embed_dim)
    fine = min(tiny_model.patch_sizes)
    assert fine not in searcher.patch_sizes
    searcher.fine._keep({0: query[0]}, fine)  # as if it had been computed
    assert searcher.search_embeds(query, 1, refine_patch_size=fine)[0][0].id == 0
    for collection in (address.name, address.collection(PATCH)):
        MilvusConnection(address).drop(collection)
    again = write_embeddings(tmp_path / "again", tiny_model, model_dir, [40], seed=5)
    build_in_milvus(again, address)
    assert searcher.reload()
    assert searcher.snapshot.generation == before.generation
    assert not kept.exists()
    for one in (searcher, Searcher.load(text, tiny_model, device="cpu")):
        plain, refined = (
            one.search_embeds(query, 40, refine_patch_size=size) for size in (None, fine)
        )
        assert refined == plain
        assert plain[0][0].key.startswith("5-")


def test_other_indexes_answer_while_milvus_does_not(
    own: tuple[LiteServer, str],
    embeddings: Path,
    tiny_model: LitModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, address = own
    build_index(embeddings, tmp_path / "folder", index_type="flat", device="cpu")
    folder = Searcher.load(tmp_path / "folder", tiny_model, device="cpu")
    monkeypatch.setattr(place, "LOOK_S", 0.01)
    monkeypatch.setattr(client, "SEARCH_S", 60.0)  # of which it takes none
    slow = Searcher.load(address, tiny_model, device="cpu")
    body = {"vector": clustered(1, tiny_model.embed_dim)[0].tolist(), "k": 5}
    asked = [*({**body, "k": k} for k in range(1, 6)), *({"id": 0, "k": k} for k in range(1, 6))]
    answers = []
    with serving({"slow": slow, "folder": folder}) as served:

        def ask(body: Any) -> None:
            answers.append(served.post("/v1/search", body))

        waiting = [threading.Thread(target=ask, args=(one,)) for one in asked]
        server.hold(True)
        try:
            for thread in waiting:
                thread.start()
            deadline = time.monotonic() + 30
            while served.service.num_in_flight < len(waiting):
                assert time.monotonic() < deadline
            delete_ids(tmp_path / "folder", [0])
            assert served.post("/v1/search", {**body, "index": "folder"}).status == 200
            assert served.get("/v1/indices/folder/sample?n=1").status == 200
            while len(folder) == sum(COUNTS):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert not answers
        finally:
            server.hold(False)
        for thread in waiting:
            thread.join()
    assert {answer.status for answer in answers} == {200}


def test_what_is_no_index_is_one_sentence(
    own: tuple[LiteServer, str], tiny_model: LitModel, embeddings: Path
) -> None:
    server, address = own
    place = parse_address(address)
    connection = MilvusConnection(place)
    hidden = parse_address(server.address(f"more_patch_{PATCH}"))
    build_in_milvus(embeddings, hidden)
    for name in ("more", f"photos_patch_{PATCH}"):
        with pytest.raises(UsageError, match=f"collection {name[:6]}.* already"):
            build_in_milvus(embeddings, parse_address(server.address(name)))
    assert len(Searcher.load(str(hidden), tiny_model)) == sum(COUNTS)
    flat = {"index_type": "FLAT", "params": {}}
    connection.create("alien", {"title": "VARCHAR"}, 8, flat, {})
    with pytest.raises(UsageError, match="no index of format"):
        Searcher.load(server.address("alien"), tiny_model)
    with pytest.raises(UsageError, match="not there"):
        Searcher.load(server.address("nothing"), tiny_model)
    with pytest.raises(UsageError, match="collection alien already"):
        build_in_milvus(embeddings, parse_address(server.address("alien")))
    catalogue = Catalogue.open(connection, place)
    connection.drop(place.collection(PATCH))
    with pytest.raises(UsageError, match="is missing"):
        Searcher.load(address, tiny_model)
    connection.create(place.collection(PATCH), {"key": "VARCHAR"}, 8, flat, {})
    with pytest.raises(UsageError, match="has no field"):
        Searcher.load(address, tiny_model)
    catalogue._put(0, "{")
    with pytest.raises(UsageError, match="damaged"):
        Searcher.load(address, tiny_model)


@pytest.mark.parametrize(
    "text",
    ["milvus:photos", "milvus:http://localhost/", "milvus:http://a:1/pho-tos", "milvus:/x/photos",
     "milvus:http://me:secret@a:1/photos"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="milvus:http") as caught:
        parse_address(text)
    assert "secret" not in str(caught.value)
