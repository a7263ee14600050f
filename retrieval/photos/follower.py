"""Runs the process that keeps an album up to date (`follow.py`), and passes on what it says.

A process of its own, so that searches do not wait for it, and neither ends the other.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict

from data.progress import Progress
from retrieval.indexing_progress import IndexingProgress
from retrieval.photos.follow import Job
from retrieval.photos.summary import PhotosReport

END_S = 10.0  # for the process to end


class Follower:
    """The process and its voice on the terminal: a bar, and lines above it."""

    def __init__(self, job: Job, on_progress: Callable[[IndexingProgress | None], object]) -> None:
        """Starts the process. on_progress: is told how far it is, from a thread; None where nothing
        is to be done."""
        self._job, self._on_progress = job, on_progress
        self._bar: Progress | None = None
        self._bar_size = 0
        self._started, self._first = 0.0, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "retrieval.photos.follow", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the program that serves
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._threads = [
            threading.Thread(target=self._hear, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._pass_on, args=(self._process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """End it: what it has written stays, and the next one goes on from there."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(1)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError, ValueError):
                assert pipe
                pipe.close()

    # ---- what it says ----------------------------------------------------------------------

    def _hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            event = json.loads(line)
            if "done" in event:
                self._show(**event)
            elif "report" in event:
                self._done()
                self._report(PhotosReport(**event["report"]))
            else:
                self._done()
                self._print(f"indexing stopped: {event['problem']}")
        self._done()

    def _pass_on(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._print(line.rstrip("\n"))

    def _show(self, patch_size: int, done: int, total: int, before: int) -> None:
        if self._bar is None or self._bar_size != patch_size:
            self._done()
            self._started, self._first, self._bar_size = time.monotonic(), done, patch_size
            if not total:
                return
            self._bar = Progress(total=total, desc=f"patch {patch_size}", unit=" photos")
        self._bar.update(done - self._bar.n)
        made, seconds = done - self._first, time.monotonic() - self._started
        left = round(seconds / made * (total - done), 1) if made else None
        if done < total:
            self._on_progress(IndexingProgress(patch_size, before + done, before + total, left))
        else:
            self._done()

    def _done(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._on_progress(None)

    def _report(self, report: PhotosReport) -> None:
        for line in report.lines(self._job.images):
            self._print(line)

    def _print(self, line: str) -> None:
        Progress.write(line, file=sys.stdout)
        sys.stdout.flush()
