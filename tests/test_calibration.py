"""What an index knows of its own similarities: measured, kept, told by programs and the service."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from launcher import ROOT
from server_thread import serving

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval import (
    Searcher,
    add_embeddings,
    build_index,
    calibrate_index,
    compact_index,
    delete_ids,
    index_photos,
    index_regions,
    index_words,
    measure_agreement,
    recalibrate,
)
from retrieval.search.background import answer_scores, log_probabilities
from retrieval.search.calibration import (
    Calibration,
    Facts,
    calibration_file,
    read_calibration,
    write_calibration,
)
from retrieval.search.config import MAX_K

FACTS = Facts("captions", 99, 10.0, 100, 100, "image", "text")


@pytest.fixture
def index(emoji_index: Path, tmp_path: Path) -> Path:
    """A copy that may be written in."""
    return Path(shutil.copytree(emoji_index, tmp_path / "drawings"))


@pytest.fixture(scope="module")
def calibrated(
    emoji_index: Path, tiny_model: LitModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "drawings"
    shutil.copytree(emoji_index, folder)
    calibrate_index(folder, tiny_model)
    return folder


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_text_is_as_probable_as_the_softmax_among_the_background_says() -> None:
    rng = np.random.default_rng(0)
    texts, images, others = (unit(rng.standard_normal((n, 32))) for n in (5, 5, 20))
    background = np.concatenate([others, texts[:1]])  # which says what the first text does
    found = log_probabilities(texts, images, background, 7.0)
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        rivals = others if number == 0 else background
        powers = np.exp(7 * (rivals @ image))
        own = np.exp(7 * (text @ image))
        assert found[number] == pytest.approx(np.log(own / (own + powers.sum())))
    scores = answer_scores(texts, images, background, 7.0)
    logits = 7 * (texts * images).sum(axis=1)
    wanted = log_probabilities(texts, images, background, 21.0) / 3 + logits / 2
    assert scores == pytest.approx(wanted)
    texts[1] = np.nan
    assert np.isnan(log_probabilities(texts, images, background, 7.0)).tolist() == [
        False, True, False, False, False
    ]  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------


def test_of_what_it_was_measured_on_the_wanted_share_is_refused(
    calibrated: Path, tiny_model: LitModel
) -> None:
    searcher = Searcher.load(calibrated, tiny_model, device="cpu")
    found = searcher.calibration
    assert found is not None
    captions = sorted({row["caption"] for row in searcher.rows(searcher.snapshot.ids().tolist())})
    assert len(captions) == found.facts.texts
    embeds = tiny_model.encode_text(captions).numpy()
    for size in searcher.patch_sizes:
        said = searcher.confidence(embeds, searcher.search(captions, 1, size), size)
        refused = np.mean([one is not None and one <= 0.2 for one in said])
        assert 0.1 < refused <= 0.2
        assert found.refused(size, 0.2) is not None


def test_candidates_hold_the_answers_that_were_promised(
    calibrated: Path, tiny_model: LitModel
) -> None:
    """Of the texts that it was measured on, by the search itself."""
    searcher = Searcher.load(calibrated, tiny_model, device="cpu")
    found = searcher.calibration
    assert found is not None
    coarse, fine = searcher.patch_sizes
    captions = sorted({row["caption"] for row in searcher.rows(searcher.snapshot.ids().tolist())})
    k, lost = 5, 0.15
    few, all_of_them = found.candidates(coarse, fine, k, lost), len(searcher)
    assert k <= few < all_of_them
    answers = [
        [
            {hit.id for hit in hits}
            for hits in searcher.search(
                captions, k, coarse, refine_patch_size=fine, candidates=candidates
            )
        ]
        for candidates in (few, all_of_them)
    ]
    missing = [len(best - some) / k for some, best in zip(*answers, strict=True)]
    assert np.mean(missing) <= lost
    with pytest.raises(UsageError, match="too few"):
        found.candidates(coarse, fine, k, 0.001)
    with pytest.raises(UsageError, match="not calibrated"):
        found.candidates(fine, coarse, k, lost)


def test_ranks_beyond_all_candidates_promise_nothing() -> None:
    found = Calibration(FACTS, np.zeros((0, 4)), ranks={(56, 28): np.full((99, 10), MAX_K)})
    with pytest.raises(UsageError, match="2,048 lose more"):
        found.candidates(56, 28, 10, 0.02)


def test_without_a_caption_texts_are_asked_for(index: Path, tiny_model: LitModel) -> None:
    everything = Searcher.load(index, tiny_model, device="cpu").snapshot.ids()
    found = calibrate_index(index, tiny_model, texts=["a cat", "the sun", " "])
    assert found.facts.texts == 2
    assert found.refused(48, 0.05) is None
    calibration_file(index).unlink()
    delete_ids(index, everything[1:].tolist())
    one = calibrate_index(index, tiny_model)  # an index of one picture can refuse nothing
    assert "too few to refuse 5%" in one.line(48, 0.05)
    assert one.confidence(np.array([-1e9]), 48)[0] == 0.5
    delete_ids(index, everything[:1].tolist())
    before = calibration_file(index).read_bytes()
    with pytest.raises(UsageError, match="no image has a caption"):
        calibrate_index(index, tiny_model)
    with pytest.raises(UsageError, match="holds no image"):
        calibrate_index(index, tiny_model, texts=["a cat"])
    assert calibration_file(index).read_bytes() == before
    assert recalibrate(index, tiny_model) is None  # nor is a change an error from now on
    assert read_calibration(index) is None


# ---- keeping -------------------------------------------------------------------------------


def test_a_calibration_is_kept_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    scores = np.linspace(-5, -1, 99)
    kept = Calibration(
        FACTS, np.eye(3, dtype=np.float32), {28: scores}, {28: scores - 1}, {28: scores + 1},
        {(56, 28): np.arange(20, dtype=np.int32).reshape(10, 2)},
    )  # fmt: skip
    assert read_calibration(tmp_path) is None
    write_calibration(tmp_path, kept)
    found = read_calibration(tmp_path)
    assert found is not None
    assert found.facts == FACTS
    assert (found.background == kept.background).all()
    assert (found.present[28] == scores).all()
    assert (found.absent[28] == scores - 1).all()
    assert (found.labels[28] == scores + 1).all()
    assert (found.ranks[56, 28] == kept.ranks[56, 28]).all()
    data = bytearray(calibration_file(tmp_path).read_bytes())
    data[-5] ^= 1
    calibration_file(tmp_path).write_bytes(data)
    assert read_calibration(tmp_path) is None
    calibration_file(tmp_path).write_bytes(b"nothing")
    assert read_calibration(tmp_path) is None


def test_it_holds_for_one_model_and_until_a_fifth_has_changed() -> None:
    found = Calibration(FACTS, np.zeros((0, 3)))
    ids = np.arange(100)
    assert found.holds(ids, "image", "text")
    assert not found.holds(ids, "image", "another")
    assert not found.holds(ids, "another", "text")
    assert found.holds(np.concatenate([ids[10:], [200] * 10]), "image", "text")
    assert not found.holds(np.concatenate([ids[11:], [200] * 10]), "image", "text")


def test_a_stale_one_is_measured_again(index: Path, tiny_model: LitModel) -> None:
    assert recalibrate(index, tiny_model) is None  # nobody asked for one
    first = calibrate_index(index, tiny_model)
    assert recalibrate(index, tiny_model) is None
    searcher = Searcher.load(index, tiny_model, device="cpu")
    assert searcher.calibration is not None
    delete_ids(index, searcher.snapshot.ids()[: len(searcher) // 4].tolist())
    searcher.reload()
    assert searcher.calibration is None
    again = recalibrate(index, tiny_model)
    assert again is not None
    assert again.facts.count == len(searcher) < first.facts.count
    assert searcher.calibration is not None


# ---- telling -------------------------------------------------------------------------------


def test_the_service_and_the_program_say_the_same(
    calibrated: Path,
    tiny_model: LitModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At a rate that refuses about half, so that both answers occur."""
    searcher = Searcher.load(calibrated, tiny_model, device="cpu")
    texts = [*dict.fromkeys(hit.caption for hit in searcher.search("a cat", 20)[0])][:6]
    hits = searcher.search(texts, 10)
    confidences = searcher.confidence(tiny_model.encode_text(texts).numpy(), hits)
    rate = float(np.median([c for c in confidences if c is not None]))
    wanted = [c is not None and c > rate for c in confidences]
    assert len(set(wanted)) == 2
    with serving({"index": searcher}) as served:
        served.service.refuse = rate
        for text, confidence, is_there in zip(texts, confidences, wanted, strict=True):
            answer = served.post("/v1/search", {"text": text}).json
            assert answer["confidence"] == pytest.approx(confidence, abs=1.5 / 41)  # its own score
            assert answer["found"] is is_there
            assert answer["hits"]
        by_id = served.post("/v1/search", {"id": hits[0][0].id}).json
        assert (by_id["found"], by_id["confidence"]) == (None, None)
        sizes = served.get("/v1/indices").json["indices"][0]["patch_sizes"]
        assert {one["patch_size"] for one in sizes if one["refusals"]} == {*searcher.patch_sizes}
        coarse, fine = searcher.patch_sizes
        promised = {"text": "a cat", "k": 5, "patch_size": coarse, "refine_patch_size": fine}
        assert served.post("/v1/search", promised | {"lost": 0.2}).json["hits"]
        refused = served.post("/v1/search", promised | {"lost": 0.0001})
        assert refused.status == 400
        assert "too few" in refused.json["error"]
        image = hits[0][0].image_bytes()
        named = served.form("/v1/classify", image=image, labels=texts[:3], patch_size=coarse).json
        assert 0 < named["confidence"] <= 1
        assert named["found"] is (named["confidence"] > rate)
        assert named["temperature"] is None
        served.service.temperatures["index"] = {coarse: 1e6}
        flat = served.form("/v1/classify", image=image, labels=texts[:3], patch_size=coarse).json
        assert [one["share"] for one in flat["labels"]] == pytest.approx([1 / 3] * 3, abs=1e-4)
        served.service.refuse = 0.0
        assert served.post("/v1/search", {"text": texts[0]}).json["found"] is None
    arguments = ["--index", f"{calibrated}", "--device", "cpu", "--refuse", f"{rate}", *texts]
    encode, encoded = LitModel.encode_text, []
    monkeypatch.setattr(
        LitModel, "encode_text", lambda *a, **k: encoded.extend(a[1]) or encode(*a, **k)
    )
    lines = program("search.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert encoded == texts  # once
    said = [lines[lines.index(text) + 1].startswith("  nothing like this here") for text in texts]
    assert said == [not is_there for is_there in wanted]


def test_the_program_calibrates(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", f"{index}", "--calibrate"]
    first, second, third = program("index.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert "of texts like the captions of this index" in first
    assert "patch 40: " in second
    assert "patch 48 to 40" in third
    assert read_calibration(index) is not None


def test_what_only_folders_have_is_refused_for_milvus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, sentence = "milvus:http://localhost:1/photos", "not for one in Milvus"
    for measure in (calibrate_index, measure_agreement):
        with pytest.raises(UsageError, match=sentence):
            measure(address)
    for flags in (["--refine-patch-size", "8", "--lost", "0.1"], ["--words", "0.5"]):
        arguments = ["--index", address, "a cat", *flags]
        with pytest.raises(SystemExit):
            program("search.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert sentence in capsys.readouterr().err


def test_no_folder_is_called_like_a_milvus(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    address, emb = "milvus:http://localhost:1/photos", tmp_path / "emb"
    for change, says in (
        (lambda: build_index(emb, address), "build_in_milvus"),
        (lambda: add_embeddings(address, emb), "add_to_milvus"),
        (lambda: delete_ids(address, [1]), "delete_in_milvus"),
        (lambda: compact_index(address), "in Milvus"),
        (lambda: index_words(address), "in Milvus"),
        (lambda: index_regions(address), "not for one in Milvus"),
        (lambda: index_photos(tmp_path, index / "model", address), "not for one in Milvus"),
    ):
        with pytest.raises(UsageError, match=says):
            change()
    assert not list((tmp_path / "here").iterdir())


def program(
    name: str, *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The lines that it prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "launch" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()
