"""A folder of pictures becomes an index, and follows the folder from then on."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import run
from shard_maker import png

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.problems import SampleError
from retrieval.index import widen
from retrieval.index.snapshot import Snapshot
from retrieval.photos.changes import compare
from retrieval.photos.indexing import index_photos
from retrieval.photos.listing import list_photos
from retrieval.photos.reading import Photos
from retrieval.search.searcher import Searcher

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, one with a caption; a broken one, and what is no picture."""
    images = tmp_path / "photos"
    (images / "trip").mkdir(parents=True)
    for number in range(8):
        (images / f"{number}.png").write_bytes(png(number, (32, 32)))
    for number in range(8, 12):
        (images / "trip" / f"{number}.PNG").write_bytes(png(number, (32, 32)))
    (images / "3.txt").write_text("a red bicycle")
    (images / "broken.jpg").write_bytes(b"no picture")
    (images / ".hidden.png").write_bytes(png(99))
    (images / "notes.md").write_text("nothing")
    return images


def take_in(folder: Path, model_dir: Path, out: Path, **options):
    return index_photos(folder, model_dir, out, num_workers=0, batch_size=4, **options)


def ids_by_key(snapshot: Snapshot) -> dict[str, int]:
    return {row["key"]: row["id"] for row in snapshot.rows(snapshot.ids().tolist())}


def keys(out: Path) -> list[str]:
    return sorted(ids_by_key(Snapshot.open(out)))


def test_one_command_makes_a_folder_searchable(
    folder: Path,
    model_dir: Path,
    tiny_model: LitModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "index"
    arguments = ["--images", str(folder), "--model", str(model_dir), "--out", str(out)]
    arguments += ["--patch-sizes", "48", "24", "--num-workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["index.py", *arguments])
    runpy.run_path(str(LAUNCH / "index.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "12 new" in printed
    assert "not_an_image 1" in printed
    assert "left out: .md 1, hidden_file 1" in printed
    searcher = Searcher.load(out, device="cpu")
    assert searcher.patch_sizes == (48, 24)
    (hits,) = searcher.search(["a red bicycle"], k=20)
    assert sorted(hit.key for hit in hits) == sorted(
        [f"{n}.png" for n in range(8)] + [f"trip/{n}.PNG" for n in range(8, 12)]
    )
    assert {hit.key: hit.caption for hit in hits}["3.png"] == "a red bicycle"
    pictures = [hit.image() for hit in hits]  # each where its row says
    for size in (48, 24):
        found = searcher.search(pictures, k=1, patch_size=size)
        assert [row[0].id for row in found] == [hit.id for hit in hits]
    assert hits[0].columns["modified"] == os.stat(hits[0].shard).st_mtime_ns


def test_a_caption_that_changes_is_taken_in(folder: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"

    def captions() -> dict[str, str]:
        snapshot = Snapshot.open(out)
        rows = snapshot.rows(snapshot.ids().tolist())
        return {row["key"]: row["caption"] for row in rows if row["caption"]}

    take_in(folder, model_dir, out, patch_sizes=(48,))
    assert captions() == {"3.png": "a red bicycle"}
    (folder / "3.txt").write_text("a blue bicycle")
    (folder / "4.json").write_text('{"caption": "a boat"}')
    (folder / "trip" / "9.txt").write_text("a boat on the sea")
    report = take_in(folder, model_dir, out)
    assert (report.added, report.changed, report.unchanged) == (0, 3, 9)
    expected = {"3.png": "a blue bicycle", "4.png": "a boat", "trip/9.PNG": "a boat on the sea"}
    assert captions() == expected
    (folder / "4.json").unlink()
    report = take_in(folder, model_dir, out)
    assert (report.added, report.changed, report.unchanged) == (0, 1, 11)
    assert captions() == {key: text for key, text in expected.items() if key != "4.png"}
    (folder / "3.json").write_text("[]")
    assert take_in(folder, model_dir, out).changed == 1
    assert captions()["3.png"] == "a blue bicycle"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": -1}, "batch_size -1: at least 0"), ({"num_workers": -1}, "num_workers -1")],
)
def test_impossible_loading_is_refused_before_a_model_is_read(
    options: dict[str, int], words: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        index_photos(folder, tmp_path / "no model", tmp_path / "index", **options)


def test_run_again_takes_in_only_what_changed(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    report = take_in(folder, model_dir, out, patch_sizes=(48,))
    assert (report.added, report.errors) == (12, {"not_an_image": 1})
    before = ids_by_key(Snapshot.open(out))

    read = []
    getitem = Photos.__getitem__
    monkeypatch.setattr(
        Photos,
        "__getitem__",
        lambda self, n: read.append(self._photos[n].key) or getitem(self, n),
    )
    monkeypatch.setattr(widen, "COMPACT_ABOVE", 0.5)
    monkeypatch.setattr(widen, "compact_index", lambda *_: pytest.fail("little has changed"))
    again = take_in(folder, model_dir, out)
    assert (again.added, again.changed, again.gone, again.unchanged) == (0, 0, 0, 12)
    assert read == ["broken.jpg"]  # tried again

    read.clear()
    (folder / "new.png").write_bytes(png(50, (32, 32)))
    (folder / "5.png").write_bytes(png(51, (40, 32)))
    report = take_in(folder, model_dir, out)
    assert (report.added, report.changed, report.gone, report.unchanged) == (1, 1, 0, 11)
    assert sorted(read) == ["5.png", "broken.jpg", "new.png"]
    monkeypatch.undo()

    (folder / "0.png").unlink()
    (folder / "1.png").rename(folder / "trip" / "1.png")
    (folder / "2.png").write_bytes(b"broken now")
    report = take_in(folder, model_dir, out)
    assert (report.added, report.changed, report.gone, report.known) == (1, 0, 2, 1)
    expected = {f"{n}.png" for n in range(3, 8)} | {f"trip/{n}.PNG" for n in range(8, 12)}
    assert keys(out) == sorted(expected | {"new.png", "trip/1.png"})
    snapshot = Snapshot.open(out)
    after = ids_by_key(snapshot)
    assert all(after[key] == before[key] for key in expected - {"5.png"})
    assert min(after["5.png"], after["new.png"], after["trip/1.png"]) > max(before.values())
    assert len(snapshot.segments) == 1  # much has changed: merged

    fresh = tmp_path / "fresh"
    take_in(folder, model_dir, fresh, patch_sizes=(48,))
    other = Snapshot.open(fresh)
    rows = ids_by_key(other)
    for key, id in after.items():
        np.testing.assert_allclose(
            snapshot.vectors([id], 48), other.vectors([rows[key]], 48), atol=1e-5
        )


def test_a_folder_that_became_empty_leaves_an_empty_index(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    for path in [*folder.rglob("*.png"), *folder.rglob("*.PNG"), folder / "broken.jpg"]:
        path.unlink()
    assert take_in(folder, model_dir, out, prune=True).gone == 12
    assert Searcher.load(out, device="cpu").search(["a cat"], k=3) == [[]]
    (folder / "back.png").write_bytes(png(1))
    take_in(folder, model_dir, out)
    assert keys(out) == ["back.png"]


@pytest.mark.parametrize("what", ["empty", "no folder", "shards", "other folder", "sizes", "model"])
def test_what_cannot_be_taken_in_is_refused(
    what: str, folder: Path, model_dir: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    out, images, options = tmp_path / "index", folder, {}
    if what in ("other folder", "sizes", "model"):
        take_in(folder, model_dir, out, patch_sizes=(48,))
    if what in ("empty", "other folder"):
        images = tmp_path / "elsewhere"
        images.mkdir()
        message = {"empty": "holds no photo", "other folder": "does not hold half of its photos"}[
            what
        ]
    elif what == "no folder":
        images, message = tmp_path / "nowhere", "no folder of photos"
    elif what == "sizes":
        options, message = {"patch_sizes": (24,)}, "has patch sizes 48, not 24"
    elif what == "model":
        other = LitModel.from_pretrained(model_dir)
        other.feature_mean += 1
        other.save_pretrained(tmp_path / "model")
        model_dir = tmp_path / "model"
        message = "another image tower"
    else:
        from index_maker import write_embeddings

        from retrieval.index.build import build_index

        build_index(write_embeddings(tmp_path / "e", tiny_model, model_dir, (9,)), out)
        message = "was made from shards"
    with pytest.raises(UsageError, match=message):
        take_in(images, model_dir, out, **options)


def test_the_first_bad_picture_can_end_the_run(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(SampleError, match=r"broken\.jpg"):
        take_in(folder, model_dir, tmp_path / "index", patch_sizes=(48,), on_error="raise")


def embedded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward has, from now on."""
    counts: list[int] = []
    encode = LitModel.encode_image
    monkeypatch.setattr(
        LitModel,
        "encode_image",
        lambda self, images, **given: counts.append(len(images)) or encode(self, images, **given),
    )
    return counts


def test_photos_of_a_folder_that_shows_none_are_kept_until_pruned(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    (folder / "trip").rename(tmp_path / "unplugged")
    (folder / "0.png").unlink()  # a single file, from a folder that shows others
    report = take_in(folder, model_dir, out)
    assert (report.gone, report.kept, report.kept_folders) == (1, 4, ["trip"])
    (folder / "trip").mkdir()  # an empty place to mount the drive
    assert take_in(folder, model_dir, out).kept == 4
    (folder / "trip").rmdir()
    (tmp_path / "unplugged").rename(folder / "trip")
    report = take_in(folder, model_dir, out)
    assert (report.kept, report.added, report.changed, report.unchanged) == (0, 0, 0, 11)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    report = take_in(folder, model_dir, out)
    assert (report.kept, report.gone, report.kept_folders) == (11, 0, ["", "trip"])
    assert take_in(folder, model_dir, out, prune=True).gone == 11
    assert keys(out) == []


def test_a_folder_that_cannot_be_listed_keeps_its_photos(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    (folder / "7.png").unlink()
    (folder / "7.png").symlink_to("/nowhere/7.png")  # as of a drive that is away
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("trip"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_photos(folder, out)
    assert (len(listing.photos), listing.errors) == (8, {"unreadable": 1})
    assert listing.left_out == {".md": 1, "hidden_file": 1, "unlisted_folder": 1}
    changes = compare(listing, Snapshot.open(out))
    assert (changes.gone, sorted(changes.kept.values())) == ([], ["", *["trip"] * 4])


def test_a_photo_that_cannot_be_read_for_now_stays(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    os.utime(folder / "5.png")
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "5.png":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert take_in(folder, model_dir, out).errors == {"not_an_image": 1, "unreadable": 1}
    assert "5.png" in keys(out)


@pytest.mark.parametrize("times", ["kept", "new"])
def test_a_moved_folder_is_known_by_its_contents(
    times: str, folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "index", tmp_path / "moved"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    before = Snapshot.open(out)
    folder.rename(moved)
    if times == "new":
        for path in moved.rglob("*.*"):
            os.utime(path)
    (moved / "new.png").write_bytes(png(50))
    (moved / "6.png").unlink()
    counts = embedded(model_dir, monkeypatch)
    report = take_in(moved, model_dir, out)
    changed = {"kept": 0, "new": 11}[times]
    assert sum(counts) == 1
    assert (report.added, report.gone, report.moved_from) == (1, 1, str(folder))
    assert (report.changed, report.known, report.unchanged) == (changed, changed, 11 - changed)
    after = Snapshot.open(out)
    ids = ids_by_key(after)
    assert sorted(ids) == sorted({*ids_by_key(before), "new.png"} - {"6.png"})
    for key, id in ids.items():
        assert after.rows([id])[0]["shard"] == str(moved / key)
        if key != "new.png":
            old = before.vectors([ids_by_key(before)[key]], 48)
            np.testing.assert_array_equal(after.vectors([id], 48), old)
    searcher = Searcher.load(out, device="cpu")
    assert {hit.key for hit in searcher.search(["a cat"], k=20)[0] if hit.image()} == {*ids}
    assert take_in(moved, model_dir, out).unchanged == 12


def test_a_subfolder_that_was_renamed_is_not_embedded_again(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    (folder / "trip").rename(folder / "trip to Oslo")
    counts = embedded(model_dir, monkeypatch)
    report = take_in(folder, model_dir, out)
    assert (report.added, report.known, report.gone, report.kept) == (4, 4, 4, 0)
    assert counts == []
    assert "trip to Oslo/9.PNG" in keys(out)
    assert len(keys(out)) == 12


def test_other_photos_under_the_same_names_are_no_moved_folder(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "index", tmp_path / "other"
    take_in(folder, model_dir, out, patch_sizes=(48,))
    (other / "trip").mkdir(parents=True)
    for path in [*folder.glob("?.png"), *folder.glob("trip/*")]:
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        (other / path.relative_to(folder)).write_bytes(data)
    with pytest.raises(UsageError, match="does not hold half of its photos"):
        take_in(other, model_dir, out)
    assert Snapshot.open(out).manifest.images == str(folder)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    (images / "a" / "b").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "3.png").write_bytes(png(3))
    (images / "a" / "1.png").write_bytes(png(1))
    (images / "a" / "b" / "2.png").write_bytes(png(2))
    (images / "0 link").symlink_to(elsewhere)
    (images / "1 again").symlink_to(elsewhere / "deep")
    (images / "2 best").symlink_to(images / "a")  # sorts before the folder itself
    (images / "a" / "b" / "up").symlink_to("../..")
    (images / "a" / "b" / "out").symlink_to("../../..")  # holds what is walked
    (elsewhere / "deep" / "round").symlink_to(elsewhere)
    listing = list_photos(images, tmp_path / "index")
    assert [photo.key for photo in listing.photos] == ["0 link/deep/3.png", "a/1.png", "a/b/2.png"]
    assert listing.left_out == {"linked_again": 5}


def test_thumbnails_bins_and_what_is_no_image_are_left_out_and_counted(tmp_path: Path) -> None:
    images = tmp_path / "photos"
    for name in (".thumbnails", ".Trash-1000", "@eaDir", "$RECYCLE.BIN", "__MACOSX", "kept"):
        (images / name).mkdir(parents=True)
        (images / name / "x.png").write_bytes(png(1))
    for name in ("._x.png", "film.MP4", "raw.cr2", "b.cr2", "README", "x.txt", ".DS_Store"):
        (images / name).write_bytes(b"something")
    os.mkfifo(images / "pipe.png")
    listing = list_photos(images, images / "index")
    assert [photo.key for photo in listing.photos] == ["kept/x.png"]
    assert listing.errors == {"special_file": 1}
    folders = {"hidden_folder": 2, "system_folder": 3}
    files = {"hidden_file": 1, ".mp4": 1, ".cr2": 2, "other_suffix": 1}
    assert listing.left_out == folders | files


def test_photos_of_a_folder_that_is_left_out_now_leave_the_index(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    monkeypatch.setattr("retrieval.photos.listing.SYSTEM_FOLDERS", frozenset())
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "x.png").write_bytes(png(60))
    assert take_in(folder, model_dir, out, patch_sizes=(48,)).added == 13
    monkeypatch.undo()
    report = take_in(folder, model_dir, out)
    assert (report.gone, report.kept, report.left_out["system_folder"]) == (1, 0, 1)


def test_caption_files_of_equal_times_are_seen_to_change(
    folder: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, files = tmp_path / "index", [folder / "3.txt", folder / "3.json"]

    def caption() -> str:
        snapshot = Snapshot.open(out)
        (row,) = [r for r in snapshot.rows(snapshot.ids().tolist()) if r["key"] == "3.png"]
        return row["caption"]

    def write(text: str) -> None:  # with the times that an archive gives everything
        (folder / "3.json").write_text(json.dumps({"captions": [text]}))
        for path in files:
            os.utime(path, ns=(10**18, 10**18))

    take_in(folder, model_dir, out, patch_sizes=(48,))
    counts = embedded(model_dir, monkeypatch)
    write("a boat")
    take_in(folder, model_dir, out)
    assert caption() == "a boat"
    write("a larger boat")
    report = take_in(folder, model_dir, out)
    assert (caption(), report.changed, report.known) == ("a larger boat", 1, 1)
    assert take_in(folder, model_dir, out).changed == 0
    assert counts == []  # the photo is as it was


def test_captions_that_cannot_be_used_are_counted(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    (folder / "3.json").write_text("{")  # the text beside it is good
    (folder / "1.json").write_text("[]")
    (folder / "2.txt").write_text("  ")
    (folder / "4.txt").write_bytes(b"caf\xe9")
    (folder / "5.json").write_text('{"taken": "2019"}')
    report = take_in(folder, model_dir, tmp_path / "index", patch_sizes=(48,))
    assert report.added == 12
    counts = {"bad_json": 1, "empty_caption": 1, "no_caption": 1, "not_utf8": 1}
    assert dict(sorted(report.captions.items())) == counts
    rows = Snapshot.open(tmp_path / "index")
    captions = {row["caption"] for row in rows.rows(rows.ids().tolist())}
    assert captions == {"", "a red bicycle"}
    (folder / "broken.jpg").unlink()
    with pytest.raises(SampleError, match=r"1\.png: .*bad_json"):
        take_in(folder, model_dir, tmp_path / "other", patch_sizes=(48,), on_error="raise")


PROGRAM = """
import os, signal, sys, time
from retrieval.photos import indexing
from retrieval.photos.reading import Photos
indexing.WRITE_EVERY = 4
getitem = Photos.__getitem__
def slow(self, number):
    if number == 6:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return getitem(self, number)
Photos.__getitem__ = slow
indexing.index_photos(*sys.argv[1:4], patch_sizes=(48,), num_workers=0, batch_size=2, device="cpu")
"""


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_did_and_goes_on(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    arguments = [str(folder), str(model_dir), str(out)]
    killed = run("-c", PROGRAM, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(Snapshot.open(out)) == 6  # the first batch of two, then four
    report = take_in(folder, model_dir, out)
    assert (report.added, report.unchanged) == (6, 6)
    assert len(keys(out)) == 12
