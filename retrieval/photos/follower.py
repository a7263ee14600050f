"""Runs the process that keeps an album up to date (`follow.py`), and passes on what it says.

A process of its own, so that searches do not wait for it, and neither ends the other.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from data.progress import Progress
from retrieval.detail import Detail, finest, from_key, said
from retrieval.index.manifest import read_index_manifest
from retrieval.indexing_progress import IndexingProgress, TimeLeft
from retrieval.photos.follow import Job
from retrieval.photos.summary import PhotosReport

END_S = 10.0  # for the process to end


class Follower:
    """The process and its voice on the terminal: a bar, and lines above it."""

    def __init__(self, job: Job, on_progress: Callable[[IndexingProgress | None], object]) -> None:
        """Starts the process. on_progress: is told how far it is, at once and from a thread; None
        where it has ended well, or waits to look again."""
        self._job, self._on_progress = job, on_progress
        self._bar: Progress | None = None
        self._bar_size: Detail = 0
        self._time_left = TimeLeft()
        self._is_ending = False
        sizes = read_index_manifest(Path(job.album)).patch_sizes
        self._last = IndexingProgress(finest(sizes), 0, 0)
        on_progress(self._last)
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
        self._is_ending = True
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
                continue
            self._close_bar()
            if "report" in event:
                self._report(PhotosReport(**event["report"]))
            elif "found" in event:
                count = event["found"]
                self._print(f"{count:,} new or changed photo{'s' * (count > 1)}, reading")
            elif "note" in event:
                self._print(event["note"])
            elif "problem" in event:
                self._stopped(event["problem"])
            else:
                self._rests()
        self._close_bar()
        status = self._process.wait()
        if status and not self._is_ending:
            self._stopped(_why(status))
        self._rests()

    def _pass_on(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._print(line.rstrip("\n"))

    def _show(self, patch_size: int | str, done: int, total: int, before: int) -> None:
        size = from_key(patch_size)
        if self._bar is None or self._bar_size != size:
            self._close_bar()
            self._bar_size, self._time_left = size, TimeLeft()
            if not total:  # nothing is new; what was wrong is over
                self._last = replace(self._last, problem="")
                return
            self._bar = Progress(total=total, desc=said(size), unit=" photos")
        self._bar.update(done - self._bar.n)
        left = self._time_left(done, total)
        self._tell(IndexingProgress(size, before + done, before + total, left))
        if done == total:
            self._close_bar()

    def _tell(self, progress: IndexingProgress) -> None:
        self._last = progress
        self._on_progress(progress)

    def _stopped(self, problem: str) -> None:
        self._print(f"indexing stopped: {problem}")
        self._tell(replace(self._last, seconds_left=None, problem=problem))

    def _rests(self) -> None:
        if not self._last.problem:
            self._on_progress(None)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _report(self, report: PhotosReport) -> None:
        for line in report.lines(self._job.images):
            self._print(line)

    def _print(self, line: str) -> None:
        Progress.write(line, file=sys.stdout)
        sys.stdout.flush()


def _why(status: int) -> str:
    """A sentence for a process that ended with another status than 0."""
    if status < 0:
        return (
            f"its process was killed (signal {-status}), perhaps because memory ran out; start "
            "again to go on"
        )
    return f"its process ended with status {status}, the terminal shows why; start again to go on"
