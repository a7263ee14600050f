"""Requests that arrive together share one forward, or one search.

A thread takes the oldest waiting request and all others of its key. It waits a moment for requests
that the server has taken in and that are not queued yet; a lone request never waits.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from retrieval.index_interface import IndexUnavailable
from retrieval.server.refusals import RequestError

Run = Callable[[Any, list[Any]], Sequence[Any]]
"""(key, items) -> one result per item."""


@dataclass
class _Job:
    key: Hashable
    items: Sequence[Any]
    future: "asyncio.Future[list[Any]]"
    loop: asyncio.AbstractEventLoop


class Batcher:
    """A queue, and the thread that empties it. Jobs of equal keys are run together."""

    def __init__(
        self,
        run: Run,
        max_batch: int = 64,
        max_queue: int = 256,
        window_s: float = 0.002,
        num_expected: Callable[[], int] = lambda: 0,
        observe: Callable[[int], object] = lambda num_jobs: None,
    ) -> None:
        """max_batch: items of one run. max_queue: jobs that may wait. num_expected: requests under
        way in the whole server. observe: is told how many jobs a run serves."""
        self._run, self._max_batch, self._max_queue = run, max_batch, max_queue
        self._window_s, self._num_expected, self._observe = window_s, num_expected, observe
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    async def submit(self, key: Hashable, items: Sequence[Any]) -> list[Any]:
        """One result per item. Raises what `run` raises, and `RequestError` when the queue is full.

        More items than max_batch are run in several steps, other jobs between them.
        """
        results: list[Any] = []
        loop = asyncio.get_running_loop()
        for start in range(0, len(items), self._max_batch):
            job = _Job(key, items[start : start + self._max_batch], loop.create_future(), loop)
            with self._changed:
                if len(self._jobs) >= self._max_queue:
                    raise RequestError(429, "too many requests are waiting; try again in a second")
                self._jobs.append(job)
                self._changed.notify()
            results += await job.future
        return results

    def close(self) -> None:
        """End the thread after the run under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        while jobs := self._take():
            self._observe(len(jobs))
            try:
                results = self._run(jobs[0].key, [item for job in jobs for item in job.items])
                outcomes: list[Any] = []
                for job in jobs:
                    outcomes.append(list(results[: len(job.items)]))
                    results = results[len(job.items) :]
            except IndexUnavailable as error:  # which would take as long again
                outcomes = [error] * len(jobs)
            except Exception:
                outcomes = [self._alone(job) for job in jobs]  # only the bad one fails
            loop = jobs[0].loop
            try:
                loop.call_soon_threadsafe(_deliver, jobs, outcomes)
            except RuntimeError:  # the server is gone
                logging.getLogger(__name__).debug("the event loop ended before an answer")

    def _alone(self, job: _Job) -> Any:
        try:
            return list(self._run(job.key, list(job.items)))
        except Exception as error:
            return error

    def _take(self) -> list[_Job]:
        """The oldest job and those of its key, [] when closed."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self._window_s
            while not self._closed and self._may_grow() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                return []
            taken: list[_Job] = []
            waiting: list[_Job] = []
            size = 0
            key = self._jobs[0].key
            for job in self._jobs:
                if job.future.cancelled():
                    continue
                if job.key == key and size + len(job.items) <= self._max_batch:
                    taken.append(job)
                    size += len(job.items)
                else:
                    waiting.append(job)
            self._jobs = waiting
        return taken or self._take()

    def _may_grow(self) -> bool:
        """Whether the batch has room and another in-flight request is not queued here yet."""
        key = self._jobs[0].key
        size = sum(len(job.items) for job in self._jobs if job.key == key)
        return size < self._max_batch and self._num_expected() > len(self._jobs)


def _deliver(jobs: Sequence[_Job], outcomes: Sequence[Any]) -> None:
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.future.done():  # cancelled: its request timed out
            continue
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
