"""`launch/photos.py`: one command from a folder of photos to a page that finds them."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from exif_maker import block, rationals, text, with_exif
from launcher import ROOT
from PIL import Image
from shard_maker import png

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.locks import only_writer
from retrieval import index_regions, indexing_progress
from retrieval.index.manifest import read_index_manifest
from retrieval.index.snapshot import Snapshot
from retrieval.index.widen import add_patch_size
from retrieval.indexing_progress import IndexingProgress, TimeLeft
from retrieval.photo_service import make_album, prepare, serve_photos
from retrieval.photos import finer, follow, indexing
from retrieval.photos.albums import GOOD_MODEL, AlbumFacts, find_album
from retrieval.photos.finer import add_finer, usual_patch_sizes
from retrieval.photos.follow import AlbumKeeper, Job, pause_s
from retrieval.photos.follower import Follower
from retrieval.photos.indexing import index_photos
from retrieval.photos.listing import list_photos
from retrieval.regions import updating
from retrieval.search import neighbours
from retrieval.search.agreement import read_agreement
from retrieval.search.searcher import Searcher

PATIENCE_S = 120


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_photos(folder: Path, count: int) -> Path:
    (folder / "trip").mkdir(parents=True)
    for number in range(count):
        (folder / "trip" / f"{number:03d}.png").write_bytes(png(number, (32, 32)))
    return folder


# ---- the program -----------------------------------------------------------------------------


# Before the process that indexes runs: it waits at one photo until a file is there. To the other
# one every machine is busy.
GATE = """
import os, sys, time
if "retrieval.photos.follow" in sys.orig_argv:
    from retrieval.photos.reading import Photos
    getitem = Photos.__getitem__
    def wait(self, number):
        while self._photos[number].key == "trip/070.png" and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.02)
        return getitem(self, number)
    Photos.__getitem__ = wait
else:
    from retrieval import machine_load
    machine_load.BUSY = -1.0
"""


class Program:
    """`launch/photos.py`, and a client of its page."""

    def __init__(self, *arguments: str | Path, gate: Path | None = None) -> None:
        command = [sys.executable, str(ROOT / "launch/photos.py"), *map(str, arguments)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        if gate is not None:
            (gate.parent / "site").mkdir(exist_ok=True)
            (gate.parent / "site" / "sitecustomize.py").write_text(GATE)
            path = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), str(ROOT))))
            env |= {"GATE": str(gate), "PYTHONPATH": f"{gate.parent / 'site'}{os.pathsep}{path}"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--no-browser"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline()]
        self.port = int(self.lines[0].partition("http://127.0.0.1:")[2].split()[0])

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    @property
    def index(self) -> dict[str, Any]:
        return json.loads(self.ask("/v1/indices")[1])["indices"][0]

    def search(self, **request: Any) -> list[dict[str, Any]]:
        status, body = self.ask("/v1/search", {"text": "a red bicycle", "k": 100, **request})
        assert status == 200, body
        return json.loads(body)["hits"]

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while not what(found := self.index):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def end(self, number: int = signal.SIGINT) -> str:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        self.lines.append(self.process.stdout.read())
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        return "".join(self.lines)


@contextmanager
def running(*arguments: str | Path, gate: Path | None = None) -> Iterator[Program]:
    program = Program(*arguments, gate=gate)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.end(signal.SIGKILL)


def sizes(index: dict[str, Any]) -> list[int]:
    return [size["patch_size"] for size in index["patch_sizes"] if size["in_index"]]


@pytest.mark.slow
def test_a_folder_is_found_in_while_it_is_indexed_and_after_a_kill(
    tmp_path: Path, cache: Path, model_dir: Path
) -> None:
    photos = make_photos(tmp_path / "Holiday", 90)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "notes.bak").write_text("nothing")
    for folder in (photos / "trip", photos):
        folder.chmod(0o555)
    before = sorted(photos.rglob("*"))
    sizes_wanted = ("--patch-sizes", "24", "48")
    with running(photos, "--model", model_dir, *sizes_wanted, gate=tmp_path / "gate") as program:
        status, page = program.ask("/")  # while torch is still being imported
        assert status == 200
        assert b"<html" in page
        assert program.index["indexing"] is not None  # before the other process has said anything
        found = program.wait_for(lambda index: index["count"] > 0)
        assert (found["name"], found["count"], sizes(found)) == ("Holiday", 63, [48])
        assert (found["indexing"]["total"], found["indexing"]["patch_size"]) == (91, 48)
        assert found["indexing"]["done"] in (0, 64)
        assert len(program.search()) == 63
        assert "other programs" not in program.end(signal.SIGKILL)
    times = [json.loads(file.read_text())["spell"] for file in cache.rglob("profiles/*.json")]
    assert times == ["disturbed"]
    (tmp_path / "gate").touch()
    album = find_album(photos)
    assert album == cache / "photos" / "Holiday"
    assert len(Snapshot.open(album)) == 63
    with running(photos) as program:
        found = program.wait_for(lambda index: index["indexing"] is None)
        assert (found["count"], sizes(found)) == (90, [48, 24])
        hits = program.search(where={"folder": "trip"}, patch_size=24)
        assert {hit["columns"]["file"] for hit in hits} == {f"{n:03d}.png" for n in range(90)}
        said = program.end()
    assert program.process.returncode == 0
    assert "28 new or changed photos, reading" in said
    assert "27 new, 0 changed, 0 gone, 63 as before" in said
    assert "skipped: not_an_image 1 (broken.jpg)" in said
    assert "left out: .bak 1" in said
    assert sorted(photos.rglob("*")) == before


@pytest.mark.slow
def test_new_and_removed_photos_are_seen_until_the_server_is_gone(
    tmp_path: Path, model_dir: Path
) -> None:
    photos, album = make_photos(tmp_path / "photos", 3), tmp_path / "album"
    index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
    job = Job(str(photos), str(album), watch_s=0.2, num_workers=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "retrieval.photos.follow", json.dumps(asdict(job))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    reports = (e["report"] for e in map(json.loads, process.stdout) if "report" in e)
    assert next(reports)["unchanged"] == 3
    (photos / "trip" / "later.png").write_bytes(png(77))
    assert next(reports)["added"] == 1
    (photos / "trip" / "000.png").unlink()
    assert next(reports)["gone"] == 1
    assert len(Snapshot.open(album)) == 3
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0
    process.stdout.close()


@pytest.mark.slow
def test_what_stopped_indexing_is_told(
    tmp_path: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos, album = make_photos(tmp_path / "photos", 3), tmp_path / "album"
    index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
    job = Job(str(photos), str(album), num_workers=0)

    def told_by(disturb: Callable[[Follower], object]) -> list[IndexingProgress | None]:
        told: list[IndexingProgress | None] = []
        follower = Follower(job, told.append)
        disturb(follower)
        for thread in follower._threads:
            thread.join(PATIENCE_S)
        follower.end()
        return told

    first, last = told_by(lambda follower: follower._process.kill())
    assert first == IndexingProgress(48, 0, 0)
    assert last is not None
    assert (last.total, last.problem.partition(",")[0]) == (0, "its process was killed (signal 9)")
    with only_writer(album):
        last = told_by(lambda follower: None)[-1]
    assert last is not None
    assert "is being written by process" in last.problem
    assert told_by(lambda follower: None)[-1] is None
    said = capfd.readouterr().out
    assert said.count("indexing stopped: ") == 2


# ---- what it finds before torch is imported ----------------------------------------------------


def test_a_moved_folder_is_known_again(tmp_path: Path, cache: Path, model_dir: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    album = find_album(photos)
    assert album == cache / "photos" / "photos"
    index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
    AlbumFacts(str(model_dir), (48,)).write(album)
    assert find_album(photos) == album
    assert find_album(photos, "open_clip:other@x") == cache / "photos" / "photos-2"
    other = make_photos(tmp_path / "elsewhere" / "photos", 4)
    assert find_album(other) == cache / "photos" / "photos-2"  # a copy is another folder
    photos.rename(tmp_path / "Bilder")
    assert find_album(tmp_path / "Bilder") == album
    assert prepare(str(tmp_path / "Bilder")).model == ""
    assert find_album(tmp_path / "elsewhere") == cache / "photos" / "elsewhere"


def test_what_cannot_work_is_one_sentence(
    tmp_path: Path, cache: Path, model_dir: Path, emoji_index: Path
) -> None:
    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            prepare(*arguments, **options)

    refused("is no folder of photos", str(tmp_path / "nothing"))
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "film.mov").write_bytes(b"")
    refused("holds no photo .*left out: .mov 1", str(tmp_path / "empty"))
    photos = str(make_photos(tmp_path / "photos", 2))
    refused(f"no model is given; --model {GOOD_MODEL} is a good one", photos)
    refused("no model at 'nothing'", photos, model="nothing")
    refused("made from shards", photos, index=str(emoji_index))
    refused("something else than an index", photos, index=photos, model=str(model_dir))
    refused("not for one in Milvus", photos, index="milvus:http://localhost:1/photos")
    assert not cache.exists() or not any(cache.rglob("*.json"))
    album = tmp_path / "album"
    index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
    refused("has a model of its own", photos, index=str(album), model=GOOD_MODEL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "1.png").write_bytes(png(1234))
    refused("does not hold half of its photos", str(other), index=str(album))
    assert prepare(photos, index=str(album)).model == ""


def test_a_model_that_cannot_be_had_ends_with_one_sentence(tmp_path: Path, cache: Path) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    with pytest.raises(UsageError, match=r"cannot download open_clip:ViT-B-32@.*say open_clip:"):
        serve_photos(prepare(str(photos), model=GOOD_MODEL), port=0, open_browser=False)
    assert not any(cache.rglob("manifest.json"))


def test_an_album_is_there_with_its_facts_or_not_at_all(
    tmp_path: Path, cache: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    first, second = (prepare(str(photos), model=str(model_dir)) for _ in range(2))
    with monkeypatch.context() as patched:
        patched.setattr(AlbumFacts, "write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_album(first)
    assert not any(cache.rglob("photos/manifest.json"))
    make_album(first)
    assert AlbumFacts.read(find_album(photos)).model == str(model_dir)
    make_album(second)  # the other program was faster


def test_weights_that_are_on_the_machine_are_the_default(tmp_path: Path) -> None:
    folder = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    code = "from retrieval.photos.albums import usual_model; print(usual_model())"
    for there in (False, True):
        if there:
            (folder / "refs").mkdir(parents=True)
            (folder / "refs/main").write_text("abc")
            (folder / "snapshots/abc").mkdir(parents=True)
            (folder / "snapshots/abc/open_clip_model.safetensors").write_bytes(b"")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path)},
        )  # fmt: skip
        assert (done.stdout.strip() == GOOD_MODEL) is there, done.stderr


# ---- finer patch sizes -------------------------------------------------------------------------


def test_a_finer_patch_size_is_added_behind(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, album = make_photos(tmp_path / "photos", 9), tmp_path / "album"
    options: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
    index_photos(photos, model_dir, album, (48,), **options)
    (photos / "trip" / "004.png").unlink()
    (photos / "trip" / "new.png").write_bytes(png(99))
    index_photos(photos, model_dir, album, **options)
    model = LitModel.from_pretrained(album / "model")
    hidden = photos / "trip" / "002.png"
    hidden.rename(tmp_path / "away.png")
    monkeypatch.setattr(finer, "READ_TOGETHER", 4)
    told: list[tuple[int, int]] = []
    unread = add_finer(album, model, 24, "cpu", lambda *counts: told.append(counts))
    assert unread == [str(hidden)]
    assert told == [(3, 9), (7, 9), (8, 9)]
    assert read_index_manifest(album).patch_sizes == (48,)  # it waits for the photo
    (tmp_path / "away.png").rename(hidden)
    encoded = []
    encode = LitModel.encode_image
    monkeypatch.setattr(
        LitModel, "encode_image", lambda *a, **k: encoded.append(len(a[1])) or encode(*a, **k)
    )
    assert add_finer(album, model, 24, "cpu") == []
    assert encoded == [1]  # the others were kept
    index_photos(photos, model_dir, tmp_path / "both", (48, 24), **options)
    one, both = (Searcher.load(folder, device="cpu") for folder in (album, tmp_path / "both"))
    for size in (48, 24):
        found, wanted = (
            {hit.key: hit.similarity for hit in s.search(["a dog"], k=20, patch_size=size)[0]}
            for s in (one, both)
        )
        assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(UsageError, match="has it already"):
        add_patch_size(album, 24, lambda ids: np.zeros((len(ids), one.model.embed_dim)))


@pytest.fixture
def keep(tmp_path: Path, model_dir: Path) -> Callable[[Path], list[str]]:
    """Bring the album of a folder up to date, in this process; returns its notes."""
    keepers: dict[Path, AlbumKeeper] = {}
    notes: list[str] = []

    def say(**event: Any) -> None:
        assert "problem" not in event
        notes.extend([event["note"]] if "note" in event else [])

    def update(photos: Path) -> list[str]:
        if photos not in keepers:
            album = tmp_path / "album"
            index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
            job = Job(str(photos), str(album), (48, 24), num_workers=0)
            keepers[photos] = AlbumKeeper(job, say)
        notes.clear()
        keepers[photos].update()
        return list(notes)

    return update


def test_new_photos_are_told_before_a_model_is_loaded_and_a_busy_machine_delays_no_look(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, album = make_photos(tmp_path / "photos", 2), tmp_path / "album"
    index_photos(photos, model_dir, album, (48,), num_workers=0, device="cpu")
    told: list[dict[str, Any]] = []
    job = Job(str(photos), str(album), num_workers=0)
    keeper = AlbumKeeper(job, lambda **event: told.append(event))
    keeper.update()
    seconds = {"now": 0.0, "queued": 0.0}

    def list_slowly(*arguments: Any) -> Any:
        seconds["now"] += 9.0
        seconds["queued"] += 8.0
        return list_photos(*arguments)

    monkeypatch.setattr(indexing, "list_photos", list_slowly)
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: seconds["now"]))
    monkeypatch.setattr(follow, "queued_s", lambda: seconds["queued"])
    keeper.update()
    assert keeper.looked_s == 1.0
    assert [pause_s(10.0, looked_s) for looked_s in (0.1, keeper.looked_s)] == [10.0, 20.0]
    (photos / "trip" / "later.png").write_bytes(png(77))
    told.clear()
    monkeypatch.setattr(indexing, "load_model", Mock(side_effect=UsageError("no memory")))
    with pytest.raises(UsageError, match="no memory"):
        keeper.update()
    assert told[0] == {"found": 1}


def test_a_finer_patch_size_waits_quietly_for_a_photo(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, away = make_photos(tmp_path / "photos", 3), tmp_path / "away"
    (photos / "drive").mkdir()
    photo = photos / "drive" / "1.png"
    photo.write_bytes(png(99))
    add = finer._locations

    def locations(*arguments: Any) -> Any:
        """The drive is unplugged once the album holds its photo."""
        if photo.exists() and not away.exists():
            photo.parent.rename(away)
        return add(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(finer, "_locations", locations)
        (note,) = keep(photos)
    assert note == f"patch size 24 waits: 1 photos cannot be read now ({photo})"
    with monkeypatch.context() as patched:
        patched.setattr(LitModel, "from_pretrained", None)  # no model is loaded
        assert keep(photos) == []
    away.rename(photo.parent)
    assert keep(photos) == []
    assert read_index_manifest(tmp_path / "album").patch_sizes == (48, 24)


def test_a_photo_that_cannot_be_read_is_tried_again_when_it_has_changed(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    broken = photos / "broken.png"
    broken.write_bytes(b"no picture")
    keep(photos)
    with monkeypatch.context() as patched:
        patched.setattr(LitModel, "from_pretrained", None)  # no model is loaded
        keep(photos)
    broken.write_bytes(png(7))
    keep(photos)
    assert read_index_manifest(tmp_path / "album").count == 3


def test_a_photo_that_may_not_be_read_is_tried_again_once_it_may(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    keep(photos)
    shut = photos / "shut.png"
    shut.write_bytes(png(8))
    read, access = Path.read_bytes, os.access

    def denied(path: Path) -> bytes:
        if path.name == shut.name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", denied)
        patched.setattr(os, "access", lambda path, mode: path != str(shut) and access(path, mode))
        keep(photos)
        patched.setattr(LitModel, "from_pretrained", None)  # no model is loaded
        keep(photos)
    assert read_index_manifest(tmp_path / "album").count == 2
    keep(photos)
    assert read_index_manifest(tmp_path / "album").count == 3


def test_patch_sizes_are_compared_behind(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own: list[int] = []
    write = neighbours.write_agreement
    monkeypatch.setattr(neighbours, "write_agreement", lambda *a: own.append(a[1].own) or write(*a))
    keep(make_photos(tmp_path / "photos", 60))
    assert own == [8, 24]  # the model's own; then the finest, among all photos
    found = read_agreement(tmp_path / "album")
    assert found is not None
    assert (found.indexed, [*found.sizes]) == ((48, 24), [48])


def test_patch_sizes_that_cannot_be_compared_cost_a_sentence(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Mock(side_effect=RuntimeError("no\nroom"))
    monkeypatch.setattr(neighbours, "measure_agreement", failing)
    notes = keep(make_photos(tmp_path / "photos", 3))
    assert notes == ["patch sizes could not be compared: RuntimeError: no room"] * 2
    assert read_index_manifest(tmp_path / "album").patch_sizes == (48, 24)


def test_the_parts_of_an_album_that_has_some_follow_it(
    tmp_path: Path, keep: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, album = make_photos(tmp_path / "photos", 3), tmp_path / "album"
    assert keep(photos) == []
    assert not (album / "regions").exists()
    index_regions(album, device="cpu")
    assert keep(photos) == []
    (photos / "trip" / "000.png").unlink()
    (photos / "trip" / "new.png").write_bytes(png(99))
    busy = Mock(side_effect=UsageError("another program is at it"))
    with monkeypatch.context() as patched:
        patched.setattr(updating, "index_regions", busy)
        assert keep(photos) == ["parts of photos are not up to date: another program is at it"]
        assert keep(photos) == []  # it is tried again, and said once
        busy.side_effect = UsageError("the disk is full")
        assert keep(photos) == ["parts of photos are not up to date: the disk is full"]
        assert busy.call_count == 3
    assert keep(photos) == ["39 regions at patch 48; pictures added: 1, gone: 1"]
    assert Searcher.load(album, device="cpu").warning(regions=True) == ""


def test_the_time_left_forgets_what_was_known_already(monkeypatch: pytest.MonkeyPatch) -> None:
    now, left = 0.0, TimeLeft()
    monkeypatch.setattr(indexing_progress, "time", SimpleNamespace(monotonic=lambda: now))
    assert left(0, 20_000) is None
    for done in (10_000, 10_010, 10_020, 10_030, 10_040):
        now += 10
        estimate = left(done, 20_000)
    assert estimate == pytest.approx((20_000 - 10_040) / 1.0)
    now += 100  # one report in a long time is a rate, too
    assert left(10_140, 20_000) == pytest.approx((20_000 - 10_140) / 1.0)


def test_the_usual_patch_sizes_are_a_coarse_and_an_affordable_one(tiny_model: LitModel) -> None:
    coarse, fine = usual_patch_sizes(tiny_model)
    assert coarse == max(tiny_model.patch_sizes) > fine
    gflops = tiny_model.vision.gflops
    assert gflops(fine) <= 4 * gflops(coarse)
    finest = max(size for size in tiny_model.patch_sizes if size < fine)
    assert gflops(finest) > 4 * gflops(coarse)


# ---- columns -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Tag data larger than file")  # of Pillow
def test_dates_places_and_cameras_are_columns(tmp_path: Path, model_dir: Path) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "green").save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    paris = {
        1: text("N"), 2: rationals((48, 1), (51, 1), (30, 1)),
        3: text("E"), 4: rationals((2, 1), (17, 1), (40, 1)),
    }  # fmt: skip
    good = block(
        {0x10F: text("Canon"), 0x110: text("Canon EOS 5D")},
        {0x9003: text("2019:07:14 12:30:05")}, paris,
    )  # fmt: skip
    hostile = block({0x10F: (2, 0xFFFFFFF0, b"\0\0\0\0"), 0x132: text("0000:00:00 00:00:00")})
    (photos / "good.jpg").write_bytes(with_exif(jpeg, good))
    (photos / "hostile.jpg").write_bytes(with_exif(jpeg, hostile))
    out = tmp_path / "album"
    report = index_photos(photos, model_dir, out, (48,), num_workers=0, device="cpu")
    assert (report.added, report.errors) == (4, {})
    searcher = Searcher.load(out, device="cpu")

    def found(**where: Any) -> list[str]:
        return sorted(hit.key for hit in searcher.search(["a dog"], k=9, where=where)[0])

    assert found(taken={">=": "2019-07", "<": "2019-08"}) == ["good.jpg"]
    assert found(camera={"contains": "canon"}) == ["good.jpg"]
    assert found(latitude={">": 48.8, "<": 48.9}, longitude={">": 2, "<": 3}) == ["good.jpg"]
    assert found(folder="") == ["good.jpg", "hostile.jpg"]
    assert found(file="001.png") == ["trip/001.png"]
    (hits,) = searcher.search(["a dog"], k=1, where={"key": "hostile.jpg"})
    names = ("taken", "latitude", "longitude", "camera")
    assert [hits[0].columns[name] for name in names] == [None] * 4
    (photos / "good.txt").write_text("a caption")  # a row that is made of the old one
    (photos / "good.jpg").rename(photos / "trip" / "moved.jpg")
    (photos / "good.txt").rename(photos / "trip" / "moved.txt")
    assert index_photos(photos, model_dir, out, num_workers=0, device="cpu").known == 1
    searcher.reload()
    assert found(taken={"contains": "2019"}, folder="trip", file="moved.jpg") == ["trip/moved.jpg"]
