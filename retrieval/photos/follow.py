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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError, UsageError, refusal_of_disk
from retrieval.index.manifest import read_index_manifest
from retrieval.photos.albums import AlbumFacts

NICENESS = 10  # searches come first
SHARE = 0.05  # of the time, at most, that looking may take: a network's folder is slow to list
REPORT_S = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be kept up to date."""

    images: str
    album: str
    patch_sizes: tuple[int, ...] = ()  # that the index shall have; none: those of album.json
    watch_s: float = 0.0  # between two looks at the folder; 0: one look
    num_workers: int = 2


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no event

    def say(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF, a photo's own affair
    with contextlib.suppress(OSError, AttributeError):  # Windows has none
        os.nice(NICENESS)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        follow(job, say)


def _end_with_stdin() -> None:
    while os.read(0, 1024):  # sys.stdin's lock would be held in the workers that are forked
        pass
    os._exit(0)


def follow(job: Job, say: Callable[..., None]) -> None:
    """Index, again and again if asked."""
    num_rounds, looked = 0, 0.0
    while True:
        try:
            looked = _round(job, say, is_first=num_rounds == 0)
        except BrokenPipeError:
            raise
        except Exception as error:
            told = isinstance(error, UsageError | DataError)
            sentence = str(error) if told else refusal_of_disk(error)
            if sentence is None:
                raise
            say(problem=sentence)
        num_rounds += 1
        if not job.watch_s:
            return
        time.sleep(max(job.watch_s, looked / SHARE))


def _round(job: Job, say: Callable[..., None], is_first: bool) -> float:
    """Take in what has changed. Returns the seconds that it took to see that."""
    from retrieval.photos.finer import add_finer
    from retrieval.photos.indexing import index_photos, load_model

    album = Path(job.album)
    held = read_index_manifest(album).patch_sizes
    tell, start, seen = _Teller(say, min(held)), time.monotonic(), []

    def progress(done: int, total: int, before: int) -> None:
        seen.append(time.monotonic() - start)
        tell(done, total, before)

    report = index_photos(
        job.images, album / "model", album, num_workers=job.num_workers, on_progress=progress
    )
    if is_first or report.num_taken or report.gone or report.moved_from:
        say(report=asdict(report))
    wanted = job.patch_sizes or AlbumFacts.read(album).patch_sizes
    missing = sorted(set(wanted) - set(held), reverse=True)
    model = load_model(album / "model", "auto") if missing else None
    for size in missing:
        assert model is not None
        unread = add_finer(album, model, size, on_progress=_Teller(say, size))
        if unread:
            say(problem=f"patch size {size} waits: {unread:,} photos cannot be read now")
    return seen[0]


class _Teller:
    """Says how far an album is, not more often than a reader can follow."""

    def __init__(self, say: Callable[..., None], patch_size: int) -> None:
        self._say, self._patch_size, self._next = say, patch_size, 0.0

    def __call__(self, done: int, total: int, before: int = 0) -> None:
        if time.monotonic() >= self._next or done == total:
            self._say(patch_size=self._patch_size, done=done, total=total, before=before)
            self._next = time.monotonic() + REPORT_S


if __name__ == "__main__":
    main()
