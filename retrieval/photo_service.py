"""A folder of photos becomes a page: its index is found or made, served, and kept up to date.

Order matters to who waits: the page first, then searches in what the index holds, then indexing.
"""

import contextlib
import os
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import Fit
from data.errors import UsageError, check_utf8
from data.files import make_folder
from data.locks import only_writer
from retrieval.detail import MaxTokens, said
from retrieval.early_page import EarlyPage
from retrieval.index.manifest import read_index_manifest
from retrieval.index_places import index_folder
from retrieval.indexing_progress import IndexingProgress
from retrieval.model_folder import check_model_folder, load_model
from retrieval.photos.albums import AlbumFacts, find_album, holds_its_photos, usual_model
from retrieval.photos.follow import Job
from retrieval.photos.follower import Follower
from retrieval.photos.listing import holds_photo, list_photos, no_photo
from retrieval.server.config import ServeConfig
from retrieval.server.startup import BACKLOG, listen, run_service

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel

WATCH_S = 10.0  # between two looks at the folder
HOST, PORT = "127.0.0.1", ServeConfig.port


@dataclass(frozen=True)
class PhotoService:
    """What is served, as `prepare` found it."""

    job: Job
    model: str  # that makes the index, "" for one that exists
    fit: Fit | None = None  # of an index that is made; None: the model's own


def prepare(
    images_dir: str,
    index: str = "",
    model: str = "",
    patch_sizes: tuple[int, ...] = (),
    watch: bool = False,
    fit: Fit | None = None,
) -> PhotoService:
    """What can be refused before torch is imported, is. index: "" for the album of this folder.

    Raises `UsageError` for what is no folder of photos, an index of something else, and where no
    model is given that could make one.
    """
    images = Path(os.path.abspath(images_dir))
    check_utf8(str(images))
    if not images.is_dir():
        raise UsageError(f"{images_dir} is no folder of photos")
    if index:
        album = Path(os.path.abspath(index_folder(index, "a folder of photos")))
    else:
        album = find_album(images, model)
    is_new = not (album / "manifest.json").is_file()
    if is_new:
        if not holds_photo(images):
            raise UsageError(no_photo(images, list_photos(images, album)))
        if album.is_file() or (album.is_dir() and any(album.iterdir())):
            raise UsageError(f"{album} holds something else than an index; choose another folder")
        model = model or usual_model()
        check_model_folder(model)
        make_folder(album.parent)
    elif index:
        _check_given(album, images, model)
    if not is_new:
        _check_read(album, fit, patch_sizes)
    job = Job(str(images), str(album), patch_sizes, WATCH_S if watch else 0.0)
    return PhotoService(job, model if is_new else "", fit)


def _check_given(album: Path, images: Path, model: str) -> None:
    """Raises `UsageError` for an index of other photos or of another model."""
    made_from = read_index_manifest(album).images
    if not made_from:
        raise UsageError(f"{album} was made from shards, not from photos; choose another folder")
    if made_from != str(images) and not holds_its_photos(album, images):
        raise UsageError(
            f"{album} was made from {made_from}, and {images} does not hold half of its photos; "
            "choose another folder"
        )
    if model and AlbumFacts.read(album).model != model:
        raise UsageError(f"{album} has a model of its own; leave model {model!r} out, or choose "
                         "another folder")  # fmt: skip


def _check_read(album: Path, fit: Fit | None, patch_sizes: tuple[int, ...]) -> None:
    """Raises `UsageError` for an index whose photos are read otherwise."""
    manifest = read_index_manifest(album)
    made, budgets = manifest.fit, [d for d in manifest.patch_sizes if isinstance(d, MaxTokens)]
    if patch_sizes and budgets:
        raise UsageError(
            f"the index {album} holds {said(*budgets)} an image: patch_sizes are for others"
        )
    if fit is not None and made != fit and (made or fit != "crop"):
        raise UsageError(
            f"the index {album} was made with fit {made or 'crop'}, not {fit}; leave that out, or "
            "name another index"
        )


def serve_photos(service: PhotoService, port: int | None = None, open_browser: bool = True) -> None:
    """Serve until SIGTERM or SIGINT. port: None for the usual one, or any where that is taken."""
    job = service.job
    listening = _listen(port)
    with contextlib.closing(listening):
        listening.listen(BACKLOG)
        early_page = EarlyPage(listening)
        url = f"http://{HOST}:{listening.getsockname()[1]}"
        print(f"{url}  (Ctrl-C ends it; index: {job.album})", flush=True)
        follower = None
        try:
            model = make_album(service) if service.model else None
            if open_browser and _has_display():
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
            from retrieval.server.loading import load_service

            loaded = load_service(ServeConfig(index=(job.album,)), model, tell_load=False)
            (served,) = loaded.indexes.values()

            def note(progress: IndexingProgress | None) -> None:
                served.indexing = progress

            follower = Follower(job, note)  # not before: times of patch sizes were measured
            run_service(loaded, listening, take_over=early_page.stop)
        finally:
            for connection in early_page.stop():
                connection.close()
            if follower is not None:
                follower.end()


def make_album(service: PhotoService) -> "LitModel | None":
    """An index without photos, and with the coarsest patch size alone. Returns its model; None
    where another program has made it since `prepare`, which is taken. Raises `UsageError` where
    that is of another model."""
    from retrieval.photos.finer import usual_patch_sizes
    from retrieval.photos.indexing import new_album

    job, album = service.job, Path(service.job.album)
    with only_writer(album):
        if (album / "manifest.json").is_file():
            _check_given(album, Path(job.images), service.model)
            return None
        model = load_model(service.model, "auto")
        for size in job.patch_sizes:
            model.vision.check_patch_size(size)
        sizes = job.patch_sizes or usual_patch_sizes(model)
        facts = AlbumFacts(service.model, sizes)
        new_album(
            album, Path(job.images), service.model, model, (max(sizes),), facts=facts,
            fit=service.fit,
        )  # fmt: skip
        return model


def _listen(port: int | None) -> socket.socket:
    try:
        return listen(HOST, PORT if port is None else port)
    except UsageError:
        if port is not None:
            raise
        return listen(HOST, 0)


def _has_display() -> bool:
    """Whether a browser would open a window, rather than take over the terminal."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
