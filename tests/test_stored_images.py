"""The files of an index's images over HTTP: one, several as a ZIP, and nothing else."""

import asyncio
import io
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval.photos.indexing import index_photos
from retrieval.search.searcher import Searcher
from retrieval.server.api import stored_images
from retrieval.server.api.stored_images import file_name
from retrieval.server.api.zip_stream import ZipStream
from retrieval.server.config import Limits

NAMES = ("a/sea.jpg", "b/sea.jpg", "b/ünïcode 'n\".png", "c/old.bmp")
SECRET = b"root:x:0:0:"
NO_ID = 10**6


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("album")
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 200), (40 * number, 90, 120)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def index(album: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "album"
    index_photos(album, model_dir, out, patch_sizes=[48])
    return out


@pytest.fixture(scope="module")
def served(index: Path, tiny_model: LitModel) -> Iterator[Served]:
    with serving({"album": Searcher.load(index, tiny_model, device="cpu")}) as one:
        yield one


def ids_of(served: Served) -> dict[str, int]:
    """By key."""
    hits = served.get("/v1/indices/album/images").json["hits"]
    return {hit["key"]: hit["id"] for hit in hits}


def test_a_file_is_sent_as_it_is(served: Served, album: Path) -> None:
    kinds = ("image/jpeg", "image/jpeg", "image/png", "image/bmp")
    for (key, id), kind in zip(sorted(ids_of(served).items()), kinds, strict=True):
        path = f"/v1/images/album/{id}/file"
        answer = served.get(path)
        assert answer.body == (album / key).read_bytes()
        assert answer.headers["content-type"] == kind
        assert answer.headers["content-length"] == str(len(answer.body))
        assert answer.headers["content-disposition"].startswith("inline; ")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        again = served.get(path, {"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
        attached = served.get(f"{path}?download=true").headers["content-disposition"]
        assert attached.startswith("attachment; ")
    assert (
        "filename*=UTF-8''%C3%BCn%C3%AFcode%20%27n"
        in served.get(f"/v1/images/album/{ids_of(served)[NAMES[2]]}/file").headers[
            "content-disposition"
        ]
    )


def test_what_is_known_of_an_image_is_told(served: Served, album: Path) -> None:
    key, id = next(iter(ids_of(served).items()))
    about = served.get(f"/v1/images/album/{id}/about").json
    assert (about["key"], about["id"]) == (key, id)
    assert about["bytes"] == (album / key).stat().st_size
    assert "modified" in about["columns"]


def test_a_zip_holds_the_files_under_names_of_their_own(served: Served, album: Path) -> None:
    ids = ids_of(served)
    answer = served.get(f"/v1/indices/album/zip?ids={','.join(map(str, ids.values()))},{NO_ID}")
    assert 'attachment; filename="album.zip"' in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["sea.jpg", "sea (2).jpg", "ünïcode 'n_.png", "old.bmp"]
        assert archive.read("sea (2).jpg") == (album / "b/sea.jpg").read_bytes()


@pytest.mark.parametrize(
    ("ids", "status"),
    [("", 400), ("1;2", 400), ("-1", 400), (str(10**30), 400), ("9" * 5000, 400), (str(NO_ID), 404),
     (",".join(map(str, range(501))), 400)],
)  # fmt: skip
def test_a_zip_of_nothing_or_too_much_is_refused(served: Served, ids: str, status: int) -> None:
    answer = served.get(f"/v1/indices/album/zip?ids={ids}")
    assert answer.status == status
    assert answer.json["error"].startswith("ids: ")


def test_how_many_images_a_zip_takes_is_told_with_the_other_limits(served: Served) -> None:
    limits = served.get("/v1/indices").json["limits"]
    assert limits["max_chosen"] == stored_images.MAX_CHOSEN
    assert limits["max_k"] == served.service.limits.max_k


def test_a_zip_has_a_size(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_images, "MAX_ZIP_BYTES", 100)
    answer = served.get(f"/v1/indices/album/zip?ids={','.join(map(str, ids_of(served).values()))}")
    assert (answer.status, "choose fewer" in answer.json["error"]) == (400, True)


def test_downloads_at_once_are_few(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_images, "MAX_DOWNLOADS", 0)
    id = next(iter(ids_of(served).values()))
    for path in (f"/v1/images/album/{id}/file", f"/v1/indices/album/zip?ids={id}"):
        assert served.get(path).status == 429


def test_a_file_that_is_still_read_has_a_place_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = next(iter(ids_of(served).values()))
    file, read = f"/v1/images/album/{id}/file", stored_images._read
    all_places, go_on = threading.Barrier(3, timeout=20), threading.Event()

    async def read_slowly(*args: object) -> bytes:
        await asyncio.to_thread(all_places.wait)
        await asyncio.to_thread(go_on.wait, 20)
        return await read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_images, "MAX_DOWNLOADS", 2)
    monkeypatch.setattr(stored_images, "_read", read_slowly)
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(served.get, path) for path in (file, f"/v1/indices/album/zip?ids={id}")]
        try:
            all_places.wait()
            assert served.get(file).status == 429
        finally:
            go_on.set()
        assert [one.result().status for one in slow] == [200, 200]


def test_a_download_that_fails_or_is_left_gives_its_place_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = next(iter(ids_of(served).values()))
    path = f"/v1/images/album/{id}/file"
    monkeypatch.setattr(stored_images, "MAX_DOWNLOADS", 1)
    with monkeypatch.context() as broken:
        broken.setattr("retrieval.server.served_index.read_image", lambda location: SECRET)
        assert served.get(path).status == 404
    assert served.get(path).status == 200

    async def never_begins(*args: object) -> None:
        raise OSError("the client has left")

    with monkeypatch.context() as left:
        left.setattr(stored_images.StreamingResponse, "__call__", never_begins)
        assert served.get(path).status == 500
    assert served.get(path).status == 200


def test_a_zip_is_made_beside_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, add = set(), ZipStream.add

    def note(stream: ZipStream, name: str, data: bytes) -> None:
        threads.add(threading.current_thread().name)
        add(stream, name, data)

    monkeypatch.setattr(ZipStream, "add", note)
    ids = ",".join(map(str, ids_of(served).values()))
    assert served.get(f"/v1/indices/album/zip?ids={ids}").status == 200
    assert all(name.startswith("images") for name in threads), threads


def test_a_file_in_an_images_place_is_not_sent(
    tmp_path: Path, album: Path, tiny_model: LitModel, model_dir: Path
) -> None:
    shutil.copytree(album, tmp_path / "album")
    index_photos(tmp_path / "album", model_dir, tmp_path / "index", patch_sizes=[48])
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET * 1000)
    swapped, gone, *_ = sorted(NAMES)
    (tmp_path / "album" / swapped).unlink()
    (tmp_path / "album" / swapped).symlink_to(secret)
    (tmp_path / "album" / gone).unlink()
    with serving({"album": searcher}) as served:
        ids = ids_of(served)
        for key, words in ((swapped, "has changed"), (gone, "cannot be read")):
            for what in ("", "/file"):
                answer = served.get(f"/v1/images/album/{ids[key]}{what}")
                assert (answer.status, SECRET in answer.body) == (404, False)
                assert words in answer.json["error"]
        answer = served.get(f"/v1/indices/album/zip?ids={','.join(map(str, ids.values()))}")
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            assert len(archive.namelist()) == len(NAMES) - 2 + 1
            left_out = archive.read("left out.txt").decode()
        assert f"{swapped}: " in left_out
        assert f"{gone}: " in left_out
        assert SECRET not in answer.body


def test_without_digests_only_images_are_sent(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As indexes by 0.1.0 have none."""
    monkeypatch.setattr("retrieval.server.served_index.read_image", lambda location: SECRET)
    answer = served.get(f"/v1/images/album/{ids_of(served)[NAMES[0]]}/file")
    assert (answer.status, "is no image" in answer.json["error"]) == (404, True)


def test_without_the_token_nothing_of_an_image_is_told(index: Path, tiny_model: LitModel) -> None:
    searcher = Searcher.load(index, tiny_model, device="cpu")
    id = int(searcher.snapshot.ids()[0])
    with serving({"album": searcher}, token="sesame") as served:
        for path in (f"images/album/{id}/file", f"images/album/{id}/about",
                     f"indices/album/zip?ids={id}", "indices/album/images",
                     "indices/album/columns", "indices/album/scale"):  # fmt: skip
            assert served.get(f"/v1/{path}").status == 401
            assert served.get(f"/v1/{path}", {"Authorization": "Bearer sesame"}).status == 200


def test_a_download_may_take_longer_than_an_answer(
    index: Path, tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = Searcher.load(index, tiny_model, device="cpu")
    ids = searcher.snapshot.ids().tolist()
    whole = sum(row["size"] for row in searcher.rows(ids))
    read = stored_images._read

    async def slowly(*args: object) -> bytes:
        await asyncio.sleep(0.3)
        return await read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_images, "_read", slowly)
    with serving({"album": searcher}, limits=Limits(timeout_s=0.7)) as served:
        start = time.monotonic()
        answer = served.get(f"/v1/indices/album/zip?ids={','.join(map(str, ids))}")
        assert time.monotonic() - start > 0.7
        assert len(answer.body) > whole
        end = time.monotonic() + 10  # the answer's end is read here before it is noted there
        while served.service.num_in_flight and time.monotonic() < end:
            time.sleep(0.01)
        assert served.service.num_in_flight == 0


@pytest.mark.parametrize(
    ("key", "name"),
    [("a/b.JPG", "b.JPG"), ("train/00001", "00001.png"), ("../../..", "image.png"),
     ("c:\\x\\..\\y.gif", "y.gif"), ("a/.hidden", "hidden.png"), ("a\0b\n.png", "a_b_.png")],
)  # fmt: skip
def test_names_of_files_are_harmless(key: str, name: str) -> None:
    assert file_name(key, b"\x89PNG\r\n\x1a\n") == name


def test_names_in_a_zip_differ_even_where_case_does_not_count() -> None:
    stream = ZipStream()
    for name in ("a.jpg", "A.jpg", "a (2).jpg", "b", "b"):
        stream.add(name, b"x")
    with zipfile.ZipFile(io.BytesIO(stream.take() + stream.end())) as archive:
        assert archive.namelist() == ["a.jpg", "A (2).jpg", "a (2) (2).jpg", "b", "b (2)"]


def test_an_archive_that_is_left_ends_in_silence() -> None:
    stream = ZipStream()
    stream.add("a.jpg", b"x")
    stream._sink.close()  # as the garbage collector may, before the archive
    stream._zip.close()
