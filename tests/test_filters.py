"""Filters: the rows that they say, k hits whenever k match, and sentences for what is wrong."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from index_maker import PATCH, all_vectors, nearest, recall, write_embeddings

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.index.build import build_index, delete_ids
from retrieval.index.config import INDEX_TYPES
from retrieval.index.filters import matching, parse_where
from retrieval.index.snapshot import Snapshot

TABLE = pa.table(
    {
        "id": [1, 2, 3, 4],
        "caption": ["A cat", "two dogs", "", None],
        "size": [10, 20, 30, 40],
        "score": [0.5, None, 1.5, float("nan")],
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, [1, 2, 3, 4]),
        ({"caption": "two dogs"}, [2]),
        ({"caption": {"contains": "CAT"}}, [1]),
        ({"caption": {"contains": ""}}, [1, 2, 3]),
        ({"caption": {"!=": ""}}, [1, 2]),
        ({"not": {"caption": {"contains": "o"}}}, [1, 3, 4]),
        ({"size": {">": 10, "<=": 30}}, [2, 3]),
        ({"size": {">": 10.5}}, [2, 3, 4]),
        ({"size": {"in": [10, 40, 50]}, "caption": {"contains": "cat"}}, [1]),
        ({"any": [{"size": 10}, {"all": [{"size": {">=": 30}}, {"caption": ""}]}]}, [1, 3]),
        ({"score": {"<": 2}}, [1, 3]),
        ({"size": {"in": []}}, []),
    ],
)
def test_a_filter_lets_through_the_rows_it_says(where, expected) -> None:
    mask = matching(TABLE, json.loads(json.dumps(where)))
    assert TABLE["id"].to_numpy()[mask].tolist() == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("café", [0, 1, 2, 3]),
        ("cafe\u0301", [0, 1, 2, 3]),
        ("CAFE", [0, 1, 2, 3]),
        ("strasse", [4, 5, 6]),
        ("Straße", [4, 5, 6]),
        ("fish", [7]),
        ("σοφος", [8]),
        ("カラス", [9]),
        ("ガラス", [10, 11]),
        ("가", [12]),
        ("abc", [14]),
        ("елка", [15]),
        ("\u0301", [1]),
        ("", [*range(13), 14, 15]),
    ],
)
def test_contains_finds_every_spelling_that_reads_the_same(value: str, expected: list[int]) -> None:
    texts = [
        "a Café", "a cafe\u0301", "the cafe", "CAFÉ", "Hauptstraße 1", "STRASSE", "HAUPTSTRAẞE",
        "\ufb01sh", "ΣΟΦΟΣ", "カラス", "ガラス", "カ\u3099ラス", "가", None, "ＡＢＣ", "ёлка",
    ]  # fmt: skip
    table = pa.table({"id": range(16), "caption": pa.chunked_array([texts[:3], texts[3:]])})
    assert np.flatnonzero(matching(table, {"caption": {"contains": value}})).tolist() == expected


def test_a_function_of_ids_is_a_filter() -> None:
    assert matching(TABLE, lambda ids: ids > 2).tolist() == [False, False, True, True]
    with pytest.raises(UsageError, match="allowed is bool of shape"):
        matching(TABLE, lambda ids: ids)


def nested(depth: int) -> dict:
    return {"not": nested(depth - 1)} if depth else {"size": 10}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, "no column 'colour'; allowed: id, caption"),
        ({"size": {"~": 3}}, "no operator '~'"),
        ({"size": "big"}, "column size holds int64"),
        ({"caption": 3}, "column caption holds string"),
        ({"caption": {"contains": 3}}, "contains takes a text"),
        ({"size": {"contains": "3"}}, "column size holds int64"),
        ({"size": {"in": 3}}, "in takes a list"),
        ({"size": {"in": ["x"]}}, "column size holds int64"),
        ({"size": None}, "takes a text or a number"),
        ({"size": 2**70}, "column size holds int64"),
        ({"any": []}, "any takes a list"),
        ({"any": {"size": 1}}, "any takes a list"),
        ({"not": [1]}, "no object"),
        (nested(17), "more than 16 filters"),
    ],
)
def test_a_filter_that_cannot_work_says_why(where, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        matching(TABLE, where)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '"caption"'])
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="where"):
        parse_where(text)


@pytest.fixture(scope="module")
def embeddings(tiny_model: LitModel, model_dir: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("filters")
    return write_embeddings(folder / "embeddings", tiny_model, model_dir, (6000,))


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_a_filter_returns_k_whenever_k_match(index_type, embeddings: Path, tmp_path: Path) -> None:
    build_index(embeddings, tmp_path / "index", index_type=index_type, device="cpu")
    vectors, ids = all_vectors(embeddings)
    delete_ids(tmp_path / "index", ids[7::10].tolist())
    snapshot = Snapshot.open(tmp_path / "index")
    alive = ~np.isin(ids, ids[7::10])
    queries = vectors[::200]
    draw = np.random.default_rng(0)
    far = (vectors @ queries[0]).argsort()  # what matches lies far away from the first query
    for share in (1.0, 0.5, 0.2, 0.1, 0.03, 0.01, 0.002, 0.0003):
        wanted = draw.random(len(ids)) < share
        wanted[far[: max(1, int(share * 500))]] = True
        chosen = set(ids[wanted].tolist())
        found = snapshot.nearest(
            queries, 10, PATCH, lambda ids, c=chosen: np.array([i in c for i in ids.tolist()])
        )[1]
        kept = wanted & alive
        assert ((found >= 0).sum(axis=1) == min(10, kept.sum())).all()
        assert np.isin(found[found >= 0], ids[kept]).all()
        best = nearest(queries, vectors[kept], ids[kept], 10)
        assert recall(found, best) >= 0.85
    even = snapshot.nearest(queries, 2048, PATCH, {"even": True, "key": {"contains": "99"}})[1]
    keys = [row["key"] for row in snapshot.rows(even[0][even[0] >= 0].tolist())]
    expected = [n for n in range(0, 6000, 2) if "99" in str(n) and n % 10 != 7]
    assert sorted(keys) == sorted(f"0-0-{n}" for n in expected)


def test_an_equal_filter_is_evaluated_once(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(embeddings, tmp_path / "index", index_type="flat", device="cpu")
    snapshot = Snapshot.open(tmp_path / "index")
    calls = []
    monkeypatch.setattr(
        "retrieval.index.snapshot.matching", lambda t, w: calls.append(w) or matching(t, w)
    )
    query = all_vectors(embeddings)[0][:1]
    for _ in range(3):
        snapshot.nearest(query, 5, PATCH, {"even": True, "size": {"<": 900}})
        snapshot.nearest(query, 5, PATCH, {"size": {"<": 900}, "even": True})
    assert len(calls) == 1
    for size in range(100):  # and what is remembered is bounded
        snapshot.nearest(query, 5, PATCH, {"size": size})
    assert len(snapshot._selections) <= 40
