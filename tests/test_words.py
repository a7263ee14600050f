"""Words of captions, names and other texts: one ranking over all segments, fused with vectors."""

import json
import math
import random
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from full_disk import small_files
from index_maker import clustered
from server_thread import serving

import retrieval.index.segments as segments_module
import retrieval.index.snapshot as snapshot_module
from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.index.build import change_index, compact_index, delete_ids, index_rows, new_manifest
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.index.widen import index_words
from retrieval.search.fusion import DEPTH, LEAST_SHARE, OF_BEST, fused
from retrieval.search.searcher import Searcher
from retrieval.words.asked import MAX_WORDS, asked_words, marked, unmarked
from retrieval.words.fill import write_words
from retrieval.words.ranking import TextIndex, TextSegment
from retrieval.words.spelling import Vocabulary
from retrieval.words.text_file import Pattern, WordsFile, open_words

PATCH = 48
LAUNCH = Path(__file__).parents[1] / "launch"
VOCABULARY = [
    "cat", "dog", "house", "tree", "bicycle", "red", "green", "small", "happy", "running",
    "invoice", "of", "the", "a", "2023", "Straße", "café", "小狗", "大きな犬", "강아지",
]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    weights = [1 / (1 + n) for n in range(len(VOCABULARY))]
    return [" ".join(draw.choices(VOCABULARY, weights, k=draw.randint(0, 8))) for _ in range(count)]


def written(folder: Path, captions: Sequence[str | None], keys: Sequence[str] | None = None):
    folder.mkdir(exist_ok=True)
    file = folder / f"words_{len(list(folder.iterdir()))}.sqlite"
    columns = {"key": keys or [""] * len(captions), "caption": captions}
    table = pa.table(columns, schema=pa.schema([("key", pa.string()), ("caption", pa.string())]))
    return open_words(file, write_words(file, table))


def text_index(folder: Path, *parts: Sequence[str | None], alive: np.ndarray | None = None):
    """An index of parts of texts, numbered on from part to part."""
    segments, first = [], 0
    for part in parts:
        ids = np.arange(first, first + len(part))
        mask = np.ones(len(part), bool) if alive is None else alive[ids]
        segments.append(TextSegment(written(folder, part), ids, mask))
        first += len(part)
    return TextIndex(segments)


def found(captions: Sequence[str | None], query: str, folder: Path) -> list[int]:
    return text_index(folder, captions).match([(query, 1.0)]).ids.tolist()


# ---- ranking -------------------------------------------------------------------------------


def test_a_row_scores_the_same_however_rows_are_spread_and_deleted(tmp_path: Path) -> None:
    captions = texts(400)
    alive = np.random.default_rng(0).random(400) < 0.7
    ids = np.flatnonzero(alive)
    spread = text_index(
        tmp_path, captions[:7], captions[7:150], captions[150:399], captions[399:], alive=alive
    )
    fresh = text_index(tmp_path, [captions[id] for id in ids])
    assert spread.count == fresh.count == len(ids)
    queries = [
        "cat",
        "small hosue",
        '"red green"',
        "hap*",
        "犬 小狗",
        "the a of",
        'invoice "cat dog"',
    ]
    for query in queries:
        one, other = (index.match([(query, 1.0), ("tree", -0.5)]) for index in (spread, fresh))
        assert len(one.ids), query
        np.testing.assert_array_equal(one.ids, ids[other.ids])
        np.testing.assert_array_equal(one.scores, other.scores)  # to the last bit


def test_scores_are_bm25(tmp_path: Path) -> None:
    captions = [text for text in texts(60) if text.isascii()]
    split = [text.lower().split() for text in captions]
    mean = sum(map(len, split)) / len(split)

    def bm25(row: list[str]) -> float:
        score = 0.0
        for word in ("cat", "house"):
            held = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - held + 0.5) / (held + 0.5))
            count = row.count(word)
            score += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(row) / mean))
        return score

    wanted = {n: bm25(row) for n, row in enumerate(split) if {"cat", "house"} & set(row)}
    matches = text_index(tmp_path, captions).match([("House cat", 1.0)])
    assert dict(zip(matches.ids.tolist(), matches.scores, strict=True)) == pytest.approx(wanted)
    assert (np.diff(matches.scores) <= 0).all()
    assert matches.ranks(np.array([10**6]))[0] == 0


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("CAFE", [0]),
        ("cafe\u0301", [0]),
        ("strasse", [1]),
        ("ﬁne", [2]),  # a ligature in the query, and below in the text
        ("efficient", [2]),
        ("ΣΊΣΥΦΟΣ", [3]),
        ("किताब", [4]),
        ("2023-05", [5]),
        ("img*", [5]),
        ('"05 01"', [5]),
        ('"01 05"', []),
        ('"new york*"', [6]),
        ("“new yorker”", [6]),  # as a phone writes quotes
        ("bicylce", [7]),
        ("bcycle", [7]),
        ("小狗", [8]),
        ("狗", [8]),
        ("可爱的小狗", [8]),
        ('"的小"', []),
        ('"犬が走る"', [9]),
        ("ｲﾇ", [10]),
        ("강아지", [11]),
        ("red 小狗", [7, 8]),  # either is found
    ],
)  # fmt: skip
def test_what_a_reader_takes_for_the_same_is_found(
    query: str, rows: list[int], tmp_path: Path
) -> None:
    captions = ["Café", "Straße", "eﬃcient and fine", "Σίσυφος", "किताब", "IMG_2023-05-01.JPG",
                "the New Yorker", "a red bicycle", "小狗", "大きな犬が走る", "イヌ",
                "귀여운 강아지들", None, ""]  # fmt: skip
    assert sorted(found(captions, query, tmp_path)) == rows


def test_nothing_that_can_be_typed_is_an_error(tmp_path: Path) -> None:
    index = text_index(tmp_path, texts(50))
    for query in ('', ' ', '"', '""', '" "', '*', '"*"', '-', 'AND OR NOT', 'a*b', '(', "'", "%",
                  'NEAR(a b)', 'caption:cat', '\0', '\ud800', "x" * 5000, '"' * 999):  # fmt: skip
        index.match([(query, 1.0)])
    assert len(index.match([("the of a", 1.0)]).ids)  # stop words alone


def test_a_phrase_lies_within_one_text_and_must_be_there(tmp_path: Path) -> None:
    words = written(tmp_path, ["dog house", "cat dog", "dog cat"], ["red cat", "x", "dog"])
    index = TextIndex([TextSegment(words, np.arange(3), np.ones(3, bool))])
    assert index.match([('"cat dog"', 1.0)]).ids.tolist() == [1]
    assert index.match([('red "dog"', 1.0)]).ids.tolist()[0] == 0
    assert not len(index.match([('red "no such"', 1.0)]).ids)


def test_weights_below_zero_take_rows_away(tmp_path: Path) -> None:
    index = text_index(tmp_path, ["cat", "cat dog dog dog", "dog", "bird"])
    assert index.match([("cat", 1.0), ("dog", -1.0)]).ids.tolist() == [0]
    assert not len(index.match([("dog", -1.0)]).ids)


def test_texts_that_hold_too_little_of_a_query_can_be_left_out(tmp_path: Path) -> None:
    index = text_index(tmp_path, ["on the red bicycle", "on the way", "red", *["on"] * 20])
    query = [("a red bicycle on", 1.0)]  # "a", which no text holds, is not asked for
    assert len(index.match(query).ids) == 23
    assert index.match(query, None, 0.5).ids.tolist() == [0]
    assert index.match(query, None, 0.0, 0.9).ids.tolist() == [0]
    assert not len(index.match([("red zebra unicorn", 1.0)], None, 0.5).ids)
    assert index.match([('"red" zebra unicorn', 1.0)], None, 0.5, 0.9).ids.tolist() == [2, 0]


def test_near_words_are_those_of_few_edits() -> None:
    words = ["horse", "house", "hose", "goose", "cat", "bicycle", "elephant"]
    near = Vocabulary(words).near
    assert near("hosre") == {1: ["horse", "hose"]}
    assert near("elehpnat") == {2: ["elephant"]}
    assert near("xx") == near("zzzzzz") == {}


def test_marks_are_told_from_what_a_model_reads() -> None:
    assert [marked(text) for text in ('"a b" c', "«a»", "wor*", "5 * 3", 'a "" b', "2*3")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert unmarked('a "red bike" hous*') == "a  red bike  hous"
    assert unmarked("5 * 3") == "5 * 3"


def test_a_word_of_most_texts_ranks_what_a_rarer_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = text_index(tmp_path, ["a cat", "a dog", "a", "dog"] * 5, ["a a cat", "a tree"])
    whole = index.match([("a cat", 1.0)])
    monkeypatch.setattr("retrieval.words.ranking.MANY", 4)
    found = index.match([("a cat", 1.0)])
    holds = np.isin(whole.ids, [0, 4, 8, 12, 16, 20])
    assert found.ids.tolist() == whole.ids[holds].tolist()
    np.testing.assert_array_equal(found.scores, whole.scores[holds])
    assert len(index.match([("a", 1.0)]).ids) == 17


def test_rows_of_common_words_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [*texts(100), "a", "a cat and a cat", None]
    words = [Pattern("word", (word,)) for word in ("a", "cat", "dog", "small")]
    file = written(tmp_path, captions)
    counted = [file.postings(word) for word in words]
    monkeypatch.setattr("retrieval.words.postings.COMMON_ROWS", 1)
    monkeypatch.setattr("retrieval.words.postings.COMMON_SHARE", 0)
    noted = written(tmp_path / "common", captions)
    with monkeypatch.context() as patch:
        patch.setattr(WordsFile, "_places", None)
        for word, expected in zip(words, counted, strict=True):
            found = noted.postings(word)
            np.testing.assert_array_equal(found.rows, expected.rows)
            np.testing.assert_array_equal(found.counts, expected.counts)
            assert len(found.rows) > 1
        assert max(found.counts.max() for found in counted) > 1
    assert noted.postings(Pattern("word", ("absent",))).rows.tolist() == []


def test_what_a_query_costs_is_bounded() -> None:
    assert not marked('"' + "a" * 1_000_000)  # minutes, were each quote looked through anew
    words = [word.pattern for word in asked_words([(" ".join(map(str, range(1000))), 1.0)])]
    assert words == [Pattern("word", (str(number),)) for number in range(MAX_WORDS)]
    assert [w.pattern.prefix for w in asked_words([("a* ab*", 1.0)])] == [False, True]


# ---- in an index ---------------------------------------------------------------------------


def rows(captions: Sequence[str], width: int, first_id: int = 0, seed: int = 0) -> RowsInMemory:
    count = len(captions)
    names = [f"img-{first_id + n:04d}.jpg" for n in range(count)]
    table = {
        "id": first_id + np.arange(count),
        "key": names,
        "caption": captions,
        "shard": ["gone.tar"] * count,
        "offset": np.zeros(count, np.int64),
        "size": np.arange(count),
    }
    return RowsInMemory({PATCH: clustered(count, width, seed)}, pa.table(table))


@pytest.fixture(scope="module")
def built(tiny_model: LitModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows as one segment."""
    folder = tmp_path_factory.mktemp("words") / "index"
    width = tiny_model.embed_dim
    manifest = new_manifest(
        tiny_model.image_fingerprint, tiny_model.text_fingerprint, width, [PATCH],
        index_type="flat", device="cpu",
    )  # fmt: skip
    index_rows(folder, tiny_model, manifest, [rows(texts(300), width)], "cpu")
    return folder


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def add(index: Path, captions: Sequence[str], seed: int = 1) -> None:
    width = Snapshot.open(index).width
    change_index(index, add=lambda first: [rows(captions, width, first, seed)])


def of_index(index: Path) -> dict[int, str]:
    """id -> caption."""
    snapshot = Snapshot.open(index)
    return {row["id"]: row["caption"] for row in snapshot.rows(snapshot.ids())}


def test_changes_of_an_index_change_its_words(index: Path) -> None:
    kept = Snapshot.open(index)
    before = kept.matching_words([("cat", 1.0)])
    add(index, [*texts(40, 1), "unicorn"])
    add(index, texts(30, 2))
    delete_ids(index, before.ids[::2].tolist())
    changed = Snapshot.open(index)
    assert len(changed.segments) > 1
    captions = of_index(index)
    matches = changed.matching_words([("cat", 1.0)])
    assert set(matches.ids) == {id for id, text in captions.items() if "cat" in text.split()}
    (unicorn,) = changed.matching_words([("unicorn", 1.0)]).ids
    assert captions[unicorn] == "unicorn"
    assert changed.matching_words([(f"img-{unicorn:04d}.jpg", 1.0)]).ids[0] == unicorn

    compact_index(index, "cpu")
    compacted = Snapshot.open(index)
    assert len(compacted.segments) == 1
    for query in ("cat small", "happy hous*", '"red green"'):
        one, other = (s.matching_words([(query, 1.0)]) for s in (changed, compacted))
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.scores, other.scores)
    again = kept.matching_words([("cat", 1.0)])  # a reader keeps the state that it opened
    np.testing.assert_array_equal(again.ids, before.ids)
    assert len(kept.matching_words([("tree", 1.0)]).ids)  # asked of a file that is gone
    assert [file.name for file in (index / "words").iterdir()] == ["words_0003.sqlite"]


def test_a_filter_narrows_words_as_it_narrows_vectors(index: Path) -> None:
    snapshot = Snapshot.open(index)
    where = {"size": {"<": 100}}
    every, some = (snapshot.matching_words([("cat", 1.0)], w) for w in (None, where))
    inside = every.ids < 100
    np.testing.assert_array_equal(some.ids, every.ids[inside])
    np.testing.assert_array_equal(some.scores, every.scores[inside])


def test_fused_ranks_follow_the_formula(index: Path, tiny_model: LitModel) -> None:
    add(index, texts(80, 3))
    searcher = Searcher.load(index, tiny_model, device="cpu")
    snapshot = searcher.snapshot
    (vector,) = tiny_model.encode_text(["small cat"]).numpy()
    _, (by_vector,) = snapshot.nearest(vector[None], DEPTH, PATCH)
    matches = snapshot.matching_words([("small cat", 1.0)], None, LEAST_SHARE, OF_BEST)
    ranks = {id: 1 + (matches.scores > score).sum() for id, score in zip(*matches[:2], strict=True)}
    plain = {id: 1 + n for n, id in enumerate(by_vector.tolist())}
    for words in (0.2, 0.5, 0.9):
        score = {
            id: (1 - words) / (60 + plain.get(id, math.inf))
            + words / (60 + ranks.get(id, math.inf))
            for id in {*plain, *ranks}
        }
        (hits,) = searcher.search(["small cat"], k=30, words=words)
        got = [score[hit.id] for hit in hits]
        np.testing.assert_allclose(got, sorted(score.values(), reverse=True)[:30], rtol=1e-12)
        exact = snapshot.vectors([hit.id for hit in hits], PATCH) @ vector
        np.testing.assert_allclose([hit.similarity for hit in hits], exact, atol=1e-5)
        own = dict(zip(*matches[:2], strict=True))
        assert [hit.words for hit in hits] == [own.get(hit.id, 0.0) for hit in hits]
        (first,) = searcher.search(["small cat"], k=7, words=words)
        assert first == hits[:7]  # pages agree
    (hits,) = searcher.search(["small cat"], k=2048, words=1.0)
    assert {hit.id for hit in hits} == set(snapshot.matching_words([("small cat", 1.0)]).ids)
    assert searcher.search(["small cat"], words=0.0) == searcher.search(["small cat"])
    assert fused(np.array([1, 0]), np.array([0, 2]), 0.25).tolist() == [0.75 / 61, 0.25 / 62]


def test_words_in_quotes_must_be_there_and_the_rest_goes_on(
    index: Path, tiny_model: LitModel
) -> None:
    searcher = Searcher.load(index, tiny_model, device="cpu")
    where = {"size": {">=": 50}}
    plain, quoted, nothing = searcher.search(
        ["cat", 'small "cat dog"', '"no such words"'], k=500, words=0.5, where=where
    )
    assert len(plain) == 250
    wanted = {id for id, text in of_index(index).items() if "cat dog" in text and id >= 50}
    assert {hit.id for hit in quoted} == wanted
    assert len(wanted) > 3
    assert not nothing
    assert not searcher.search(["no such words"], words=1.0)[0]
    unknown = searcher.search(["zzzz qqqq"], words=0.5)  # no text holds them: the vectors remain
    assert [hit.id for hit in unknown[0]] == [hit.id for hit in searcher.search(["zzzz qqqq"])[0]]
    with pytest.raises(UsageError, match=r"words 1\.5 is out of range"):
        searcher.search(["cat"], words=1.5)


def test_what_words_find_is_ranked_again_at_a_finer_patch_size(
    emoji_index: Path, tiny_model: LitModel
) -> None:
    searcher = Searcher.load(emoji_index, tiny_model, device="cpu")
    coarse, fine = searcher.patch_sizes
    (caption,) = {hit.caption for hit in searcher.search(["x"], k=1)[0]}
    (hits,) = searcher.search(
        [f'"{caption}"'], k=5, patch_size=coarse, refine_patch_size=fine, candidates=5, words=0.5
    )
    assert all(caption in hit.caption for hit in hits)
    vectors = [searcher.vectors([hit.id for hit in hits], size) for size in (coarse, fine)]
    query = tiny_model.encode_text([caption]).numpy()[0]
    both = vectors[0] @ query / 3 + 2 * (vectors[1] @ query) / 3
    np.testing.assert_allclose([hit.similarity for hit in hits], both, atol=1e-5)


# ---- what goes wrong -----------------------------------------------------------------------


def test_an_index_without_words_says_how_to_get_them(index: Path, tiny_model: LitModel) -> None:
    manifest = json.loads((index / "manifest.json").read_text())
    manifest.pop("seal")
    manifest["segments"][0].pop("words")
    (index / "manifest.json").write_text(json.dumps(manifest))
    searcher = Searcher.load(index, tiny_model, device="cpu")
    assert len(searcher.search(["cat"])[0]) == 10
    command = re.escape(f"`python launch/index.py --out {index} --words` writes them")
    with pytest.raises(UsageError, match=command):
        searcher.search(["cat"], words=0.5)
    assert index_words(index) == 300
    assert searcher.reload()
    assert searcher.search(["cat"], words=1.0)[0]
    assert index_words(index) == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_words_leave_the_vectors_and_are_written_again(
    harm: str, index: Path, tiny_model: LitModel
) -> None:
    (file,) = (index / "words").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if harm == "remove":
        file.unlink()
    else:  # a new file, as the bytes of the one that others read do not change
        file.unlink()
        file.write_bytes(data if harm == "flip" else data[:-4096])
    searcher = Searcher.load(index, tiny_model, device="cpu")
    assert len(searcher.search(["cat"])[0]) == 10
    with pytest.raises(UsageError, match=r"damaged.*--words"):
        searcher.search(["cat"], words=0.5)
    with pytest.raises(UsageError, match=r"is damaged.*--words"):
        Searcher.load(index, tiny_model, device="cpu", check=True)
    assert index_words(index) == 300
    wanted = Searcher.load(index, tiny_model, device="cpu", check=True).search(["cat"], words=1.0)
    assert wanted[0]
    assert searcher.reload()  # one that has the damaged file open
    assert searcher.search(["cat"], words=1.0) == wanted


def test_a_change_that_ends_before_its_manifest_changes_no_words(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Snapshot.open(index).matching_words([("cat", 1.0)])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retrieval.index.folder.write_index_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            add(index, ["cat"] * 50)
    assert len(list((index / "words").iterdir())) == 2
    after = Snapshot.open(index).matching_words([("cat", 1.0)])
    np.testing.assert_array_equal(after.scores, before.scores)
    add(index, ["unicorn"])  # under the same number as what was left behind, and the same ids
    changed = Snapshot.open(index)
    assert changed.matching_words([("unicorn", 1.0)]).ids.tolist() == [300]
    np.testing.assert_array_equal(changed.matching_words([("cat", 1.0)]).ids, before.ids)


def test_a_full_disk_is_a_sentence_and_the_index_stays(index: Path) -> None:
    before = (index / "manifest.json").read_bytes()
    numbers = np.random.default_rng(0).integers(1 << 60, size=(300, 60))
    many = [" ".join(np.base_repr(n, 36) for n in row) for row in numbers]
    biggest = 350 * 1024  # of its files that of the words alone is larger
    with small_files(biggest), pytest.raises(UsageError, match=r"words.*is the disk full\?"):
        add(index, many)
    assert (index / "manifest.json").read_bytes() == before
    assert not list(index.rglob("*.part"))
    add(index, many)
    assert Snapshot.open(index).matching_words([(many[-1], 1.0)]).ids.tolist() == [599]


def test_without_fts5_vectors_are_indexed_and_searched(
    index: Path, tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (segments_module, snapshot_module):
        monkeypatch.setattr(module, "lacking", lambda: "SQLite 3.0 has no FTS5")
    add(index, ["cat"])
    searcher = Searcher.load(index, tiny_model, device="cpu")
    assert len(searcher) == 301
    with pytest.raises(UsageError, match="has no FTS5"):
        searcher.search(["cat"], words=0.5)
    monkeypatch.undo()
    assert index_words(index) == 1


# ---- where they are asked for --------------------------------------------------------------


def test_http_and_the_command_line_find_what_the_searcher_finds(
    index: Path,
    tiny_model: LitModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    searcher = Searcher.load(index, tiny_model, device="cpu")
    wanted = searcher.search(['small "cat"'], k=8, words=0.5)[0]
    assert len({hit.words for hit in wanted}) > 2
    with serving({"photos": searcher}) as served:
        assert served.get("/v1/indices").json["indices"][0]["words"] is True
        asked = {"text": 'small "cat"', "k": 8, "words": 0.5}
        found = served.post("/v1/search", asked).json["hits"]
        paged = [served.post("/v1/search", {**asked, "k": 4, "offset": n}).json for n in (0, 4)]
        parts = [{"text": "cat"}, {"text": "dog", "weight": -1}]
        mixed = served.post("/v1/search", {"mix": parts, "k": 300, "words": 1.0}).json["hits"]
        refused = served.post("/v1/search", {"text": "cat", "words": 2})
    for name in ("id", "words"):
        assert [hit[name] for hit in found] == [getattr(hit, name) for hit in wanted]
    assert [hit["id"] for page in paged for hit in page["hits"]] == [hit.id for hit in wanted]
    assert mixed
    assert all(hit["caption"].split().count("cat") for hit in mixed)
    assert "dog" not in mixed[0]["caption"]
    assert refused.status == 400
    assert "words" in refused.json["error"]

    arguments = ["search.py", 'small "cat"', "--index", str(index), "-k", "8", "--words", "0.5"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    runpy.run_path(str(LAUNCH / "search.py"), run_name="__main__")
    (line,) = json.loads(capsys.readouterr().out)
    assert [hit["id"] for hit in line["hits"]] == [hit.id for hit in wanted]
    monkeypatch.setattr(sys, "argv", ["index.py", "--out", str(index), "--words"])
    runpy.run_path(str(LAUNCH / "index.py"), run_name="__main__")
    assert "indexed the words of 0 images" in capsys.readouterr().out
