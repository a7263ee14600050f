"""The process that keeps an album up to date while another one serves it (`follower.py`).

    python -m retrieval.photos.follow JOB

JOB: a `Job` as JSON. It waits for a line on stdin, then indexes, adds finer patch sizes and, if
asked, looks for changes for ever. It writes a line of JSON to stdout for whatever happens, and ends
when the other end of either is gone.
"""

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError, UsageError, refusal_of_disk

NICENESS = 10  # searches come first
WATCH_S = 60.0  # between two looks at the folder
SHARE = 0.05  # of the time, at most, that looking may take: a network's folder is slow to list
REPORT_S = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be kept up to date."""

    images: str
    album: str
    patch_sizes: tuple[int, ...] = ()  # that the index shall have; none: `usual_patch_sizes`
    watch: bool = False
    num_workers: int = 2


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no event

    def say(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    import retrieval.photos.finer
    import retrieval.photos.indexing  # noqa: F401  (seconds, while the service starts)

    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        if sys.stdin.readline():
            follow(job, say)


def follow(job: Job, say: Callable[..., None]) -> None:
    """Index, again and again if asked."""
    while True:
        started = time.monotonic()
        try:
            _round(job, say)
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception as error:
            told = isinstance(error, UsageError | DataError)
            sentence = str(error) if told else refusal_of_disk(error)
            if sentence is None:
                raise
            say(problem=sentence)
        if not job.watch:
            return
        wait = max(WATCH_S, (time.monotonic() - started) / SHARE)
        if select.select([sys.stdin], [], [], wait)[0]:  # its end: the server is gone
            return


def _round(job: Job, say: Callable[..., None]) -> None:
    from retrieval.index.manifest import read_index_manifest
    from retrieval.photos.albums import missing_patch_sizes
    from retrieval.photos.finer import add_finer, usual_patch_sizes
    from retrieval.photos.indexing import index_photos, load_model

    album = Path(job.album)
    tell = _Teller(say)
    held = read_index_manifest(album).patch_sizes
    report = index_photos(
        job.images, album / "model", album, num_workers=job.num_workers,
        on_progress=lambda done, total, before: tell(min(held), done, total, before),
    )  # fmt: skip
    say(report=asdict(report))
    if job.patch_sizes and set(job.patch_sizes) <= set(held):
        return
    model = load_model(album / "model", "auto")
    for size in missing_patch_sizes(job.patch_sizes or usual_patch_sizes(model), held):
        tell = _Teller(say)
        unread = add_finer(album, model, size, on_progress=lambda done, of: tell(size, done, of, 0))  # noqa: B023
        if unread:
            say(problem=f"patch size {size} waits: {unread:,} photos cannot be read now")


class _Teller:
    """Says how far an album is, not more often than a reader can follow."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say, self._next = say, 0.0

    def __call__(self, patch_size: int, done: int, total: int, before: int) -> None:
        if time.monotonic() >= self._next or done == total:
            self._say(patch_size=patch_size, done=done, total=total, before=before)
            self._next = time.monotonic() + REPORT_S


if __name__ == "__main__":
    main()
