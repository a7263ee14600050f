"""Parts of pictures as vectors of their own: what they are, what finds them, how they follow; the
same over HTTP, with the maps that the page draws."""

import base64
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from index_maker import PATCH, write_embeddings
from PIL import Image
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval import (
    ZeroShotDetector,
    ZeroShotSegmenter,
    build_index,
    compact_index,
    delete_ids,
    index_photos,
    index_regions,
)
from retrieval.dense.examples import example_embed
from retrieval.detail import MaxTokens
from retrieval.regions import updating
from retrieval.regions.boxes import WHOLE, WINDOWS, Box, check_box
from retrieval.regions.opened import Regions
from retrieval.regions.parts import part_of, reads_whole
from retrieval.search.searcher import Searcher
from retrieval.server import service

SHAPES = [(96, 96), (60, 100), (130, 70), (96, 96), (64, 64)]


def blocks(number: int, height: int, width: int) -> Image.Image:
    """Nine by nine blocks of colours of their own, so that every part looks otherwise."""
    colours = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def made(tiny_model: LitModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, and index/ of them at patch sizes 48 and 40, with regions at 48."""
    folder = tmp_path_factory.mktemp("regions")
    tiny_model.save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for number, shape in enumerate(SHAPES):
        blocks(number, *shape).save(folder / f"photos/{number}.png")
    take_in(folder)
    report = index_regions(folder / "index", model=tiny_model)
    assert (report.added, report.gone, report.unread) == (len(SHAPES), 0, {})
    assert report.count == len(SHAPES) * len(WINDOWS)
    assert report.patch_sizes == (48,)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """One to change."""
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    take_in(folder)  # its own photos are the index's from now on
    return folder


def take_in(folder: Path) -> None:
    index_photos(
        folder / "photos", folder / "model", folder / "index", (48, 40), num_workers=0, device="cpu"
    )


@pytest.fixture(scope="module")
def searcher(made: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(made / "index", tiny_model, device="cpu")


def test_every_thing_of_a_third_of_the_sides_is_whole_in_some_window():
    assert len(set(WINDOWS)) == len(WINDOWS)
    for left in np.linspace(0, 2 / 3, 50):
        for top in np.linspace(0, 2 / 3, 50):
            right, bottom = left + 1 / 3 - 1e-9, top + 1 / 3 - 1e-9
            assert any(
                box.left <= left + 1e-9 and box.top <= top + 1e-9
                and right <= box.right and bottom <= box.bottom
                for box in WINDOWS
            )  # fmt: skip
    assert all(check_box(box) == box for box in (*WINDOWS, WHOLE))


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 1), (0, 0, 1, 1, 1), (0, 0, 1, "1"), "0011", 3, (0, 0, True, 1), (-0.1, 0, 1, 1),
        (0, 0, 1, 1.1), (0.5, 0, 0.5, 1), (0, 0.6, 1, 0.5), (0, 0, float("nan"), 1),
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_picture_is_refused(box):
    with pytest.raises(UsageError, match="four numbers from 0 to 1"):
        check_box(box)


def test_a_part_has_a_pixel_at_least():
    picture = blocks(0, 5, 7)
    assert part_of(picture, Box(0.999, 0.999, 1.0, 1.0)).size == (1, 1)
    assert part_of(picture, WHOLE).tobytes() == picture.tobytes()


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_part_of_a_picture_finds_itself(number: int, made: Path, searcher: Searcher):
    photo = str(made / f"photos/{number}.png")
    for box in (WINDOWS[0], WINDOWS[9]):
        (hits,) = searcher.search([photo], k=2, regions=True, box=box)
        assert hits[0].key == f"{number}.png"
        assert hits[0].box == pytest.approx(box, abs=1e-6)
        assert hits[0].similarity == pytest.approx(1, abs=1e-4)
        assert hits[1].key != hits[0].key


def test_a_picture_is_as_similar_as_its_best_part_or_the_whole(
    made: Path, searcher: Searcher, tiny_model: LitModel
):
    queries = ["a red bicycle", "rain", blocks(1, *SHAPES[1])]
    embeds = np.concatenate(
        [tiny_model.encode_text(queries[:2]), tiny_model.encode_image(queries[2], 48)]
    )
    found = searcher.search(queries, k=len(SHAPES), regions=True)
    parts = reads_whole(tiny_model)
    for number, shape in enumerate(SHAPES[:3]):
        picture = blocks(number, *shape)
        windows = parts.encode_image([part_of(picture, box) for box in WINDOWS], 48)
        vectors = np.concatenate([tiny_model.encode_image(picture, 48), windows])
        similarities = embeds @ vectors.T
        for hits, line in zip(found, similarities, strict=True):
            (hit,) = [hit for hit in hits if hit.key == f"{number}.png"]
            assert hit.similarity == pytest.approx(line.max(), abs=1e-4)
            best = (WHOLE, *WINDOWS)[int(line.argmax())]
            assert hit.box == pytest.approx(best, abs=1e-6)
    assert found[2][0].box == WHOLE
    for hits in found:
        assert [hit.similarity for hit in hits] == sorted(
            (h.similarity for h in hits), reverse=True
        )
    assert [len(hits) for hits in searcher.search(queries, k=2, regions=True)] == [2, 2, 2]


def test_filters_and_ids_are_those_of_the_pictures(searcher: Searcher):
    (hits,) = searcher.search(["rain"], regions=True, where={"key": {"in": ["1.png", "3.png"]}})
    assert {hit.key for hit in hits} == {"1.png", "3.png"}
    assert {hit.id for hit in hits} < set(searcher.snapshot.ids().tolist())
    (none,) = searcher.search(["rain"], regions=True, where={"key": "no such"})
    assert none == []


def test_regions_follow_their_index(copy: Path, tiny_model: LitModel):
    index = copy / "index"
    searcher = Searcher.load(index, tiny_model, device="cpu")
    gone = searcher.search([str(copy / "photos/1.png")], k=1)[0][0].id
    (copy / "photos/1.png").unlink()
    blocks(7, 80, 90).save(copy / "photos/new.png")
    take_in(copy)
    assert searcher.reload()
    (hits,) = searcher.search(["rain"], k=9, regions=True)  # before its regions know
    assert {hit.key for hit in hits} == {"0.png", "2.png", "3.png", "4.png", "new.png"}
    assert gone not in {hit.id for hit in hits}
    report = index_regions(index, model=tiny_model)
    assert (report.added, report.gone, report.unread) == (1, 1, {})
    assert searcher.reload()
    assert not searcher.reload()
    (hits,) = searcher.search([str(copy / "photos/new.png")], k=1, regions=True, box=WINDOWS[5])
    assert (hits[0].key, hits[0].box) == ("new.png", pytest.approx(WINDOWS[5], abs=1e-6))
    report = index_regions(index, model=tiny_model)
    assert (report.added, report.gone) == (0, 0)


def test_a_run_goes_on_where_another_was_stopped(
    copy: Path, tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(copy / "index/regions")
    monkeypatch.setattr(updating, "WRITE_EVERY", 2)
    write, written = updating._write, []

    def stop_at_second(*args: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write(*args))

    monkeypatch.setattr(updating, "_write", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        index_regions(copy / "index", model=tiny_model)
    monkeypatch.setattr(updating, "_write", write)
    (copy / "photos/4.png").rename(copy / "4.png")  # cannot be read, for now
    searcher = Searcher.load(copy / "index", tiny_model, device="cpu")
    assert searcher.warning(regions=True).startswith("3 of 5 images have no parts")
    report = index_regions(copy / "index", model=tiny_model)
    assert (report.added, report.unread) == (2, {"gone_or_changed": 1})
    assert report.line().endswith("; cannot be read: gone_or_changed 1")
    assert searcher.reload()
    assert searcher.warning(regions=True) == ""  # the report has told of it
    (copy / "4.png").rename(copy / "photos/4.png")
    report = index_regions(copy / "index", model=tiny_model)
    assert (report.added, report.unread, report.count) == (1, {}, len(SHAPES) * len(WINDOWS))


KILLED = """
import os, signal, sys
from retrieval import index_regions
from retrieval.index import build
from retrieval.regions import updating
updating.WRITE_EVERY = 2
commit, commits = build.commit, []
def kill_in_the_second_write(*arguments):
    if commits:
        os.kill(os.getpid(), signal.SIGKILL)
    commits.append(commit(*arguments))
build.commit = kill_in_the_second_write
index_regions(sys.argv[1], device="cpu")
"""


def test_after_a_kill_what_lacks_regions_is_found_as_a_whole_and_told(
    copy: Path, tiny_model: LitModel
):
    index = copy / "index"
    shutil.copytree(index, copy / "all")
    shutil.rmtree(index / "regions")
    assert forked.run("-c", KILLED, index).returncode == -signal.SIGKILL
    assert len(list((index / "regions/metadata").iterdir())) == 2  # of which one does not count
    searcher = Searcher.load(index, tiny_model, device="cpu")
    (hits,) = searcher.search(["rain"], k=9, regions=True)
    (whole,) = searcher.search(["rain"], k=9, patch_size=48)
    assert {hit.id for hit in hits} == {hit.id for hit in whole}
    assert len([hit for hit in hits if hit.box == WHOLE]) >= 3
    told = "3 of 5 images have no parts in the index: found as a whole only"
    assert searcher.warning(regions=True) == told
    with serving({"photos": searcher}) as one:
        assert search(one, text="rain", regions=True)["warning"] == told
    report = index_regions(index, model=tiny_model)
    assert (report.added, report.count) == (3, len(SHAPES) * len(WINDOWS))
    assert searcher.reload()
    assert searcher.warning(regions=True) == ""
    (hits,) = searcher.search(["rain"], regions=True)
    (wanted,) = Searcher.load(copy / "all", tiny_model, device="cpu").search(["rain"], regions=True)
    for hit, other in zip(hits, wanted, strict=True):
        assert (hit.key, hit.box) == (other.key, other.box)
        assert hit.similarity == pytest.approx(other.similarity, abs=1e-6)


def test_a_search_ends_on_the_regions_it_began_with_and_the_next_finds_the_new(
    copy: Path, tiny_model: LitModel
):
    index, queries = copy / "index", ["rain", "the sun"]
    asked, fresh = (Searcher.load(index, tiny_model, device="cpu") for _ in range(2))
    before = asked.search(queries, k=9, regions=True)
    where = {"key": {"in": ["0.png", "3.png"]}}
    among = asked.search(queries, k=9, regions=True, where=where)
    delete_ids(index, [before[0][0].id])
    blocks(8, 70, 70).save(copy / "photos/new.png")
    take_in(copy)
    index_regions(index, model=tiny_model)
    for folder in (index, index / "regions"):
        compact_index(folder, "cpu")
        assert len(list((folder / "metadata").iterdir())) == 1  # those that are open are gone
    for searcher in (asked, fresh):  # `fresh` has read nothing yet of what it has opened
        assert searcher.search(queries, k=9, regions=True) == before
        assert searcher.search(queries, k=9, regions=True, where=where) == among
        assert searcher.reload()
    opened = Searcher.load(index, tiny_model, device="cpu")
    for asked_for in ({}, {"where": where}):
        found = asked.search(queries, k=9, regions=True, **asked_for)
        assert found == opened.search(queries, k=9, regions=True, **asked_for)
    (hits,) = asked.search([str(copy / "photos/new.png")], k=1, regions=True, box=WINDOWS[4])
    assert (hits[0].key, hits[0].box) == ("new.png", pytest.approx(WINDOWS[4], abs=1e-6))


def test_what_a_filter_lets_through_is_looked_up_once(
    copy: Path, tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
):
    searcher, looked = Searcher.load(copy / "index", tiny_model, device="cpu"), []
    pictures = Regions.pictures
    monkeypatch.setattr(
        Regions, "pictures", lambda *a: looked.append(a[1].ndim == 1) or pictures(*a)
    )
    for keys in (["1.png"], ["1.png", "4.png"], ["1.png"]):
        (hits,) = searcher.search(["rain"], k=9, regions=True, where={"key": {"in": keys}})
        assert sorted(hit.key for hit in hits) == keys
    assert sum(looked) == 2  # of all regions; of those found each time
    (hits,) = searcher.search(["rain"], k=9, regions=True)
    for keys in (["1.png"], ["4.png"]):  # a function is asked each time
        chosen = [hit.id for hit in hits if hit.key in keys]
        (found,) = searcher.search(
            ["rain"], k=9, regions=True, where=lambda ids, chosen=chosen: np.isin(ids, chosen)
        )
        assert [hit.id for hit in found] == chosen
        assert len(chosen) == 1


def test_what_cannot_be_is_refused(copy: Path, searcher: Searcher, tiny_model: LitModel):
    for options, says in (
        ({"patch_size": 40}, "patch size 40 is not in the regions of .*; allowed: 48"),
        ({"words": 0.5}, "by one vector"),
        ({"refine_patch_size": 40}, "by one vector"),
    ):
        with pytest.raises(UsageError, match=says):
            searcher.search(["rain"], regions=True, **options)
    with pytest.raises(UsageError, match="a text has no parts"):
        searcher.search(["rain"], box=WHOLE)
    with pytest.raises(UsageError, match="holds patch 48, 40; allowed are these"):
        index_regions(copy / "index", (24,))
    with pytest.raises(UsageError, match="holds patch 48, not patch 40; remove it"):
        index_regions(copy / "index", (40,))
    shutil.rmtree(copy / "index/regions")
    with pytest.raises(UsageError, match=r"index has no regions; `python launch/index.py .* --reg"):
        Searcher.load(copy / "index", tiny_model).search(["rain"], regions=True)


def test_a_damaged_vector_is_noticed_by_who_reads_all(copy: Path, tiny_model: LitModel):
    (file,) = (copy / "index/regions/patch_48").glob("image*.index")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="regions"):
        Searcher.load(copy / "index", tiny_model, check=True)
    file.write_bytes(data[:-9])
    with pytest.raises(UsageError, match=r"or remove .*regions, which --regions makes again"):
        Searcher.load(copy / "index", tiny_model)


def test_an_index_of_budgets_has_regions_within_the_smallest(
    made: Path, tiny_model: LitModel, tmp_path: Path
):
    index_photos(
        made / "photos", made / "model", tmp_path / "index", max_tokens=(16, 9), num_workers=0
    )
    report = index_regions(tmp_path / "index", model=tiny_model)
    assert report.patch_sizes == (MaxTokens(9),)
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    (hits,) = searcher.search([str(made / "photos/1.png")], k=1, regions=True, box=WINDOWS[2])
    assert (hits[0].key, hits[0].box) == ("1.png", pytest.approx(WINDOWS[2], abs=1e-6))
    assert hits[0].similarity == pytest.approx(1, abs=1e-4)


def test_an_index_whose_pictures_are_gone_has_regions_of_none(
    tmp_path: Path, tiny_model: LitModel, model_dir: Path
):
    embeddings = write_embeddings(tmp_path / "emb", tiny_model, model_dir, [30])
    build_index(embeddings, tmp_path / "index", device="cpu")
    report = index_regions(tmp_path / "index", model=tiny_model)
    assert (report.added, report.patch_sizes) == (0, (PATCH,))
    assert report.unread == {"gone_or_changed": 30}
    delete_ids(tmp_path / "index", [0])
    searcher = Searcher.load(tmp_path / "index", tiny_model)
    assert searcher.warning(regions=True).startswith("29 of 29 images have no parts")
    (hits,) = searcher.search(["rain"], k=30, regions=True)
    assert len(hits) == 29
    assert {hit.box for hit in hits} == {WHOLE}


# ---- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(searcher: Searcher, emoji_index: Path, tiny_model: LitModel) -> Iterator[Served]:
    drawings = Searcher.load(emoji_index, tiny_model, device="cpu")
    with serving({"photos": searcher, "drawings": drawings}) as one:
        yield one


@pytest.fixture(scope="module")
def photo(made: Path) -> bytes:
    return (made / "photos/2.png").read_bytes()


def search(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.post("/v1/search", body)
    assert answer.status == 200, answer.body
    return answer.json


def test_hits_have_the_searchers_boxes(served: Served, searcher: Searcher) -> None:
    found = search(served, text="rain", regions=True, k=3)
    (hits,) = searcher.search(["rain"], k=3, regions=True)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in hits]
    for one, hit in zip(found["hits"], hits, strict=True):
        assert one["box"] == pytest.approx(hit.box)
        assert one["similarity"] == pytest.approx(hit.similarity, abs=1e-5)
    assert (found["patch_size"], found["found"]) == (48, None)
    assert [hit["box"] for hit in search(served, text="rain")["hits"]] == [None] * len(searcher)
    whole = search(served, text="rain", regions=True, k=2, offset=2)["hits"]
    assert whole[0]["id"] == hits[2].id
    described = {one["name"]: one for one in served.get("/v1/indices").json["indices"]}
    assert described["photos"]["region_sizes"] == [48]
    assert described["drawings"]["region_sizes"] == []


def test_a_part_of_a_picture_is_a_query(served: Served, searcher: Searcher, photo: bytes) -> None:
    box = WINDOWS[8]
    (hits,) = searcher.search(["rain"], k=9)
    (id,) = [hit.id for hit in hits if hit.key == "2.png"]
    encoded = base64.b64encode(photo).decode()
    for query in ({"image": encoded}, {"id": id}, {"mix": [{"id": id, "box": box}]}):
        asked = {**query, "regions": True} | ({} if "mix" in query else {"box": box})
        hit = search(served, **asked)["hits"][0]
        assert (hit["key"], hit["box"]) == ("2.png", pytest.approx(box, abs=1e-6))
        assert hit["similarity"] == pytest.approx(1, abs=1e-4)
    form = served.form("/v1/search", image=photo, box=list(box), regions="true").json
    assert form["hits"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    whole = search(served, image=encoded, box=box)["hits"]  # among whole pictures
    assert whole[0]["similarity"] < 0.999


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"id": 0, "box": [0, 0, 1.2, 1]}, ["box", "four numbers from 0 to 1"]),
        ({"id": 0, "box": [0.5, 0, 0.5, 1]}, ["box", "left below right"]),
        ({"id": 0, "box": [0, 0, 1]}, ["box", "four numbers"]),
        ({"id": 0, "box": [0, 0, 1, "1"]}, ["box"]),
        ({"id": 0, "box": "0011"}, ["box"]),
        ({"id": 10**9, "box": [0, 0, 1, 1]}, ["1000000000 is not in index"]),
        ({"text": "rain", "box": [0, 0, 1, 1]}, ["box", "image"]),
        ({"mix": [{"id": 0}], "box": [0, 0, 1, 1]}, ["box", "image"]),
        ({"text": "rain", "regions": True, "words": 0.5}, ["regions", "no words"]),
        ({"text": "rain", "regions": True, "refine_patch_size": 40}, ["regions", "refine nothing"]),
        ({"text": "rain", "regions": True, "patch_size": 40}, ["40", "regions of", "allowed: 48"]),
        ({"text": "rain", "regions": "yes"}, ["regions"]),
        ({"index": "drawings", "text": "rain", "regions": True}, ["drawings has none"]),
    ],
)
def test_what_is_no_part_is_refused(served: Served, body: Any, words: list[str]) -> None:
    answer = served.post("/v1/search", body)
    assert answer.status in (400, 404)
    assert set(answer.json) == {"error"}
    for word in words:
        assert word in answer.json["error"]


def test_a_map_is_the_segmenters(
    served: Served,
    searcher: Searcher,
    tiny_model: LitModel,
    photo: bytes,
    made: Path,
) -> None:
    vectors = tiny_model.encode_text(["rain"]).numpy()
    segmenter = ZeroShotSegmenter(tiny_model, ["rain"], class_embeds=vectors)
    (expected,) = segmenter.similarities(Image.open(made / "photos/2.png"), 24)
    (hits,) = searcher.search(["rain"], k=9)
    (id,) = [hit.id for hit in hits if hit.key == "2.png"]
    for image in ({"id": id}, {"image": base64.b64encode(photo).decode()}):
        found = served.post("/v1/map", {**image, "text": "rain", "patch_size": 24}).json
        np.testing.assert_allclose(found["similarities"], expected[..., 0], atol=1e-3)
        assert found["patch_size"] == 24
    by_windows = ZeroShotSegmenter(tiny_model, ["rain"], class_embeds=vectors, windows=(1, 2))
    (expected,) = by_windows.similarities(Image.open(made / "photos/2.png"), 48)
    asked = {"id": id, "text": "rain", "patch_size": 48, "windows": [1, 2]}
    found = served.post("/v1/map", asked).json
    np.testing.assert_allclose(found["similarities"], expected[..., 0], atol=1e-3)
    example = {**asked, "examples": [{"id": id}], "background": 0.9}
    (box,) = served.post("/v1/detect", {k: v for k, v in example.items() if k != "text"}).json[
        "boxes"
    ]
    assert box["score"] > 0.9
    (described,) = (
        one for one in served.get("/v1/indices").json["indices"] if one["name"] == "photos"
    )
    assert described["map_patch_sizes"] == sorted(tiny_model.patch_sizes, reverse=True)
    mask = served.post("/v1/segment", {"id": id, "labels": ["rain", "sun"]})
    assert mask.status == 200
    for body, word in (
        ({"id": id}, "text"),
        ({"text": "rain"}, "exactly one of image, image_url and id"),
        ({"id": id, "text": "rain", "patch_size": 9}, "patch_size: 9"),
        ({"id": 99999, "text": "rain"}, "99999 is not in index"),
    ):
        answer = served.post("/v1/map", body)
        assert answer.status in (400, 404)
        assert word in answer.json["error"]


def test_regions_that_come_while_an_index_is_served_are_taken_up(
    made: Path,
    tiny_model: LitModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "WATCH_S", 0.05)
    index = Path(shutil.copytree(made / "index", tmp_path / "index"))
    (index / "regions").rename(tmp_path / "regions")
    searcher = Searcher.load(index, tiny_model, device="cpu")
    with serving({"photos": searcher}) as one:
        asked = json.dumps({"text": "rain", "regions": True}).encode()
        assert "has none" in one.post("/v1/search", asked).json["error"]
        (tmp_path / "regions").rename(index / "regions")
        for _ in range(200):
            answer = one.post("/v1/search", asked)
            if answer.status == 200:
                break
        assert answer.json["hits"][0]["box"]


def test_boxes_are_the_detectors(
    served: Served, tiny_model: LitModel, photo: bytes, made: Path
) -> None:
    picture = Image.open(made / "photos/2.png")
    shown = part_of(picture, WINDOWS[0])
    encoded = base64.b64encode(photo).decode()
    base = {"image": encoded, "patch_size": 24, "background": -1}
    by_words = {**base, "labels": ["rain", "a cat"], "templates": ["{c}"]}
    by_example = {**base, "examples": [{"image": encoded, "box": list(WINDOWS[0])}]}
    words = ZeroShotDetector(tiny_model, ["rain", "a cat"], "{c}", background=-1.0)
    vector = example_embed(tiny_model, shown, 24)
    example = ZeroShotDetector(tiny_model, [shown], background=-1.0, class_embeds=vector[None])
    for body, detector in ((by_words, words), (by_example, example)):
        (expected,) = detector.predict(picture, 24)
        found = served.post("/v1/detect", body).json["boxes"]
        assert len(found) == len(expected) > 0
        for one, box in zip(found, expected, strict=True):
            left, top, right, bottom = one["box"]
            corner = (70 * left, 130 * top, 70 * (right - left), 130 * (bottom - top))
            assert corner == pytest.approx(box.box, abs=1e-6)
            assert one["score"] == pytest.approx(box.score, abs=1e-3)
            named = (["rain", "a cat"][box.label - 1], None) if body is by_words else (None, 0)
            assert (one["label"], one["example"]) == named
    form = served.form("/v1/detect", image=photo, labels=["rain"], background=-1)
    assert form.status == 200
    for change, word in (
        ({"background": None}, "background"),
        ({"background": 2}, "background"),
        ({"labels": None}, "exactly one of labels and examples"),
        ({"labels": []}, "labels"),
        ({"examples": [{"id": 0}]}, "exactly one of labels and examples"),
        ({"labels": None, "examples": [{"text": "a"}]}, "no such field"),
        ({"labels": None, "examples": [{"id": 0, "box": [0, 0, 2, 1]}]}, "four numbers"),
        ({"labels": None, "examples": [{"id": 0}]}, "templates"),
        ({"labels": None, "templates": None, "examples": [{"image": "AAAA"}]}, "allowed:"),
        ({"image": None}, "exactly one of image"),
        ({"labels": ["a", " "]}, "empty"),
    ):
        answer = served.post("/v1/detect", {**by_words, **change})
        assert answer.status == 400, change
        assert word in answer.json["error"]
