"""What the server tells of its indexes: images by a filter, columns with values, a scale."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from index_maker import PATCH, write_embeddings
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval import build_index, delete_ids
from retrieval.index.snapshot import Snapshot
from retrieval.search.background import NONSENSE, WORDS
from retrieval.search.searcher import Searcher
from retrieval.server.api.answers import ColumnAnswer
from retrieval.server.api.column_values import describe
from retrieval.server.api.similarity_scale import QUANTILE
from retrieval.server.queues.searching import SearchQueue


@pytest.fixture(scope="module")
def searcher(
    tiny_model: LitModel, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Searcher:
    """60 vectors and the column `even`, two of them deleted."""
    folder = tmp_path_factory.mktemp("contents")
    write_embeddings(folder / "emb", tiny_model, model_dir, [40, 20])
    build_index(folder / "emb", folder / "index", kind="flat", device="cpu")
    delete_ids(folder / "index", [0, 2])
    return Searcher.load(folder / "index", tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"index": searcher}) as one:
        yield one


def listed(served: Served, **asked: object) -> dict:
    words = "&".join(f"{name}={value}" for name, value in asked.items())
    answer = served.get(f"/v1/indices/index/images?{words}")
    assert answer.status == 200, answer.body
    return answer.json


def test_pages_of_a_filter_join_to_what_it_lets_through(served: Served, searcher: Searcher) -> None:
    where = '{"even":true}'
    ids, offset = [], 0
    while offset is not None:
        page = listed(served, where=where, k=7, offset=offset)
        assert page["count"] == 29
        ids += [hit["id"] for hit in page["hits"]]
        offset = page["next_offset"]
    assert ids == searcher.snapshot.ids({"even": True}).tolist()
    assert len(ids) == 29
    assert listed(served)["count"] == len(searcher) == 58


@pytest.mark.parametrize(
    ("asked", "words"),
    [("where=nonsense", "is not JSON"), ('where={"odd":1}', "no column"), ("k=0", "k: 0"),
     ("k=101", "1 to 100"), ("offset=-1", "offset: -1")],
)  # fmt: skip
def test_a_bad_list_is_refused(served: Served, asked: str, words: str) -> None:
    answer = served.get(f"/v1/indices/index/images?{asked}")
    assert answer.status == 400
    assert words in answer.json["error"]


def test_columns_are_told_with_what_the_living_rows_hold(served: Served) -> None:
    found = {one["name"]: one for one in served.get("/v1/indices/index/columns").json["columns"]}
    assert set(found) == {"key", "caption", "even"}
    assert found["even"]["kind"] == "choice"
    values = {one["value"]: one["count"] for one in found["even"]["values"]}
    assert values == {False: 29, True: 29}
    assert found["caption"]["kind"] == "text"


def described(values: list, type_: pa.DataType) -> ColumnAnswer | None:
    column = pa.chunked_array([pa.array(values, type_)])
    return describe("modified", column.drop_null(), has_nulls=column.null_count > 0)


def test_the_kind_of_a_column_is_by_its_type_and_values() -> None:
    texts = [f"text {n}" for n in range(300)]
    days = [datetime(2024, 1, 1 + n % 28) for n in range(300)]
    expected = {
        "text": (texts, pa.string()),
        "choice": (["Oslo", "Rome", None] * 100, pa.string()),
        "number": ([n / 7 for n in range(300)], pa.float32()),
        "date": (days, pa.timestamp("s", "UTC")),
    }
    for kind, (values, type_) in expected.items():
        one = described(values, type_)
        assert one is not None
        assert one.kind == kind
    one = described(["a", "b"] * 9, pa.dictionary(pa.int8(), pa.string()))
    assert one is not None
    assert [pair.value for pair in one.values] == ["a", "b"]
    one = described([day.isoformat() for day in days], pa.string())  # as photos have it
    assert one is not None
    assert (one.kind, one.least) == ("date", "2024-01-01T00:00:00")
    ns = [(1_704_110_400 + n) * 10**9 + 1 for n in range(300)]  # a photo's
    one = described(ns, pa.int64())
    assert one is not None
    assert (one.kind, str(one.least)[:7]) == (
        "date",
        "2023-12" if days[0].timestamp() < 0 else "2024-01",
    )


def test_one_value_tells_images_apart_where_some_have_none() -> None:
    one = described(["Canon EOS 5D", None, None] * 9, pa.string())  # the camera of scanned photos
    assert one is not None
    assert [(pair.value, pair.count) for pair in one.values] == [("Canon EOS 5D", 9)]


def test_a_column_of_one_value_tells_nothing_apart() -> None:
    for values, type_ in ((["x"] * 9, pa.string()), ([None] * 9, pa.string()),
                          ([2.5] * 9, pa.float64()), ([b"x", b"y"], pa.binary())):  # fmt: skip
        assert described(values, type_) is None


def test_a_filter_takes_days_as_texts(searcher: Searcher) -> None:
    from retrieval.index.filters import matching

    days = [datetime(2024, 5, day, 12) for day in (1, 2, 3)]
    for type_ in (pa.timestamp("ms"), pa.timestamp("us", "Europe/Oslo"), pa.date32()):
        table = pa.table({"taken": pa.array(days, type_)})
        where = {"taken": {">=": "2024-05-02", "<": "2024-05-03"}}
        assert matching(table, where).tolist() == [False, True, False], type_


def test_the_background_of_a_query_is_its_mean_similarity(
    served: Served, searcher: Searcher
) -> None:
    ids = searcher.snapshot.ids().tolist()
    vectors = searcher.vectors(ids, PATCH)
    asked = {"id": ids[5], "background": True}
    found = served.post("/v1/search", asked).json
    assert found["background"] == pytest.approx(float((vectors @ vectors[5]).mean()), abs=1e-5)
    assert served.post("/v1/search", {"id": ids[5]}).json["background"] is None


def test_the_scale_is_what_words_and_nonsense_reach(served: Served, searcher: Searcher) -> None:
    scale = served.get(f"/v1/indices/index/scale?patch_size={PATCH}").json
    vectors = searcher.vectors(searcher.snapshot.ids().tolist(), PATCH)

    def above(texts: Sequence[str]) -> np.ndarray:
        similarities = searcher.model.encode_text(list(texts)).numpy() @ vectors.T
        return similarities.max(axis=1) - similarities.mean(axis=1)

    assert scale["words"] == pytest.approx(float(np.quantile(above(WORDS), QUANTILE)), abs=1e-4)
    assert scale["luck"] == pytest.approx(float(np.median(above(NONSENSE))), abs=1e-4)
    assert served.get("/v1/indices/index/scale?patch_size=9").status == 400


def test_a_scale_is_measured_once_for_each_state_of_an_index(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_embeddings(tmp_path / "emb", tiny_model, model_dir, [9])
    build_index(tmp_path / "emb", tmp_path / "index", kind="flat", device="cpu")
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    searches, search = [], SearchQueue.search

    async def count(queue: SearchQueue, *args: Any) -> Any:
        searches.append(args)
        return await search(queue, *args)

    monkeypatch.setattr(SearchQueue, "search", count)
    with serving({"index": searcher}) as served:
        first = served.get("/v1/indices/index/scale").json
        again = served.get(f"/v1/indices/index/scale?patch_size={PATCH}").json
        assert first == again
        assert len(searches) == len(WORDS) + len(NONSENSE)
        delete_ids(tmp_path / "index", searcher.snapshot.ids().tolist()[1:])
        searcher.reload()
        assert served.get("/v1/indices/index/scale").json != first


def test_what_is_told_is_of_an_index_that_was_built_anew(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    for name, count in (("index", 9), ("other", 20)):
        write_embeddings(tmp_path / f"{name}.emb", tiny_model, model_dir, [count], count)
        build_index(tmp_path / f"{name}.emb", tmp_path / name, kind="flat", device="cpu")
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    with serving({"index": searcher}) as served:
        before = [served.get(f"/v1/indices/index/{what}").json for what in ("scale", "columns")]
        generation = searcher.snapshot.generation
        (tmp_path / "index").rename(tmp_path / "gone")
        (tmp_path / "other").rename(tmp_path / "index")
        searcher.reload()
        assert searcher.snapshot.generation == generation
        after = [served.get(f"/v1/indices/index/{what}").json for what in ("scale", "columns")]
    assert before[0]["words"] != after[0]["words"]
    assert before[1] != after[1]
    assert after[1]["columns"][-1]["values"][0]["count"] == 10  # even and odd, of 20


def test_an_empty_index_has_no_scale(
    tiny_model: LitModel, model_dir: Path, searcher: Searcher, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    write_embeddings(tmp_path / "emb", tiny_model, model_dir, [3])
    build_index(tmp_path / "emb", folder, kind="flat", device="cpu")
    delete_ids(folder, Snapshot.open(folder).ids().tolist())
    with serving({"index": Searcher.load(folder, tiny_model, device="cpu")}) as served:
        assert served.get("/v1/indices/index/scale").json["words"] is None
        assert served.get("/v1/indices/index/images").json["hits"] == []
