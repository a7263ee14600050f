"""The process that keeps an album up to date while another one serves it (`follower.py`).

    python -m retrieval.photos.follow JOB

JOB: a `Job` as JSON. It indexes, adds finer patch sizes and, if asked, looks for changes for ever.
It writes a line of JSON to stdout for whatever happens, and ends with its stdin: where the server
was killed, at once, so that the next one finds the album unlocked.
"""

import contextlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import NUM_WORKERS
from data.errors import UsageError, sentence_of
from data.problems import Problem
from retrieval.detail import Detail, as_key, coarse_first, finest
from retrieval.index.manifest import read_index_manifest
from retrieval.index_places import regions_folder
from retrieval.machine_load import queued_s
from retrieval.model_folder import load_model
from retrieval.photos.albums import AlbumFacts
from retrieval.photos.listing import Photo

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel

NICENESS = 10  # searches come first
SHARE = 0.05  # of the time, at most, that looking may take: a network's folder is slow to list
REPORT_S = 0.5
TRY_AGAIN_S = 600


@dataclass(frozen=True)
class Job:
    """What is to be kept up to date."""

    images: str
    album: str
    patch_sizes: tuple[int, ...] = ()  # that the index shall have; none: those of album.json
    watch_s: float = 0.0  # between two looks at the folder; 0: one look
    num_workers: int = NUM_WORKERS


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no event

    def say(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF, a photo's own affair
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    import retrieval.photos.indexing  # noqa: F401 - before it is nice: seconds, else minutes

    with contextlib.suppress(OSError, AttributeError):  # Windows has none
        os.nice(NICENESS)
    with contextlib.suppress(BrokenPipeError):
        follow(job, say)


def _end_with_stdin() -> None:
    while os.read(0, 1024):  # sys.stdin's lock would be held in the workers that are forked
        pass
    os._exit(0)


def follow(job: Job, say: Callable[..., None]) -> None:
    """Index, again and again if asked."""
    keeper = AlbumKeeper(job, say)
    while True:
        try:
            keeper.update()
        except BrokenPipeError:
            raise
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            say(problem=sentence)
        if not job.watch_s:
            return
        say(waits=True)
        time.sleep(pause_s(job.watch_s, keeper.looked_s))


def pause_s(watch_s: float, looked_s: float) -> float:
    """Between two looks at a folder. looked_s: that the last one took."""
    return max(watch_s, looked_s / SHARE)


class AlbumKeeper:
    """Brings an album up to date, and knows from one time to the next what kept it from that."""

    def __init__(self, job: Job, say: Callable[..., None]) -> None:
        self._job, self._say, self._album = job, say, Path(job.album)
        self._is_first = True
        self._waits: dict[int, _State] = {}  # by patch size
        self._failed: dict[Photo, Problem] = {}  # photos that cannot be read
        self._denied: set[Photo] = set()  # those that nobody may read
        self._next_try = 0.0
        self._regions_note = ""  # why they could not be brought up to date
        self.looked_s = 0.0  # that it took to see what had changed, other programs' turns left out

    def update(self) -> None:
        """Take in what has changed."""
        from contrastive.model.with_fit import with_fit
        from retrieval.photos.finer import add_finer
        from retrieval.photos.indexing import index_photos

        self._forgive()
        album, is_first = self._album, self._is_first
        self._is_first = False
        manifest = read_index_manifest(album)
        held, fit = manifest.patch_sizes, manifest.fit
        tell, start = _Teller(self._say, finest(held)), _own_s()
        seen: list[float] = []

        def progress(done: int, total: int, before: int) -> None:
            if not seen and total:  # the model is not loaded yet, which may take long
                self._say(found=total)
            seen.append(_own_s() - start)
            tell(done, total, before)

        report = index_photos(
            self._job.images, album / "model", album, num_workers=self._job.num_workers,
            on_progress=progress, failed=self._failed,
        )  # fmt: skip
        self._denied = {photo for photo in self._failed if not os.access(photo.path, os.R_OK)}
        self.looked_s = 0.0 if is_first else seen[0]  # the next finds in memory what it read
        has_changed = is_first or report.num_taken or report.gone or report.moved_from
        if has_changed:
            self._say(report=asdict(report))
        wanted = self._job.patch_sizes or AlbumFacts.read(album).patch_sizes
        missing = coarse_first(set(wanted) - set(held))
        missing = [size for size in missing if not self._is_as_before(size)]
        model = with_fit(load_model(album / "model", "auto"), fit) if missing else None
        if has_changed:
            self._compare_sizes(model)
        for size in missing:
            assert model is not None
            unread = add_finer(album, model, size, on_progress=_Teller(self._say, size))
            if unread:
                self._waits[size] = _State.of(album, unread)
                some = unread[0] + (", ..." if len(unread) > 1 else "")
                self._say(
                    note=f"patch size {size} waits: {len(unread):,} photos cannot be read now "
                    f"({some})"
                )
            else:
                self._compare_sizes(model)
        if (has_changed or self._regions_note) and regions_folder(album).is_dir():
            self._update_regions(model)

    def _forgive(self) -> None:
        """Let files that could not be read be tried again: once somebody may read them, and else
        now and then, as of a disk that comes back."""
        due = time.monotonic() >= self._next_try
        if due:
            self._next_try = time.monotonic() + TRY_AGAIN_S
        for photo in [photo for photo, why in self._failed.items() if why.kind == "unreadable"]:
            if os.access(photo.path, os.R_OK) and (due or photo in self._denied):
                del self._failed[photo]

    def _update_regions(self, model: "LitModel | None") -> None:
        """Of an album that has some. It may fail: new photos are found as a whole."""
        from retrieval.regions.updating import index_regions

        before, self._regions_note = self._regions_note, ""
        try:
            report = index_regions(self._album, model=model, progress=False)
        except UsageError as error:
            self._regions_note = f"parts of photos are not up to date: {error}"
            if self._regions_note != before:  # it is tried again at every look
                self._say(note=self._regions_note)
            return
        if report.added or report.gone:
            self._say(note=report.line())

    def _is_as_before(self, size: int) -> bool:
        """Whether a patch size would wait again, for the same photos."""
        before = self._waits.get(size)
        return before is not None and before == _State.of(self._album, before.unread)

    def _compare_sizes(self, model: "LitModel | None") -> None:
        """Say which patch size finds too little; measured where that is not known. It may fail."""
        from retrieval.search.neighbours import measure_agreement

        try:
            found = measure_agreement(self._album, model)
        except Exception as error:  # whatever it is, the index and its searches do without
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(note=f"patch sizes could not be compared: {reason}")
            return
        bad = [found.warning(size) for size in found.sizes] if found else []
        for warning in filter(None, bad):
            self._say(note=warning)


def _own_s() -> float:
    """A clock that stands while this process waits for its turn: on a busy machine no folder is
    slower to list."""
    return time.monotonic() - queued_s()


@dataclass(frozen=True)
class _State:
    """Of an index, and of photos that could not be read."""

    generation: int
    unread: dict[str, bool]  # path -> whether it may be opened

    @classmethod
    def of(cls, album: Path, unread: Iterable[str]) -> "_State":
        generation = read_index_manifest(album).generation
        return cls(generation, {path: os.access(path, os.R_OK) for path in unread})


class _Teller:
    """Says how far an album is, not more often than a reader can follow."""

    def __init__(self, say: Callable[..., None], patch_size: Detail) -> None:
        self._say, self._patch_size, self._next = say, patch_size, 0.0

    def __call__(self, done: int, total: int, before: int = 0) -> None:
        if time.monotonic() >= self._next or done == total:
            self._say(patch_size=as_key(self._patch_size), done=done, total=total, before=before)
            self._next = time.monotonic() + REPORT_S


if __name__ == "__main__":
    main()
