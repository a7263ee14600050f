"""Jobs of one key run together, each gets its own answer, and one bad job spoils no other."""

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from retrieval.index_interface import IndexUnavailable
from retrieval.server.config import Limits
from retrieval.server.monitoring import Metrics
from retrieval.server.queues.batching import Batcher
from retrieval.server.queues.encoding import Encoder
from retrieval.server.refusals import RequestError
from retrieval.server.uploads import Uploads


class Doubling:
    """Doubles numbers, remembers what it was given; waits until it is let go."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, list[int]]] = []
        self.go_on = threading.Event()
        self.begun = threading.Event()

    def __call__(self, key: Any, items: list[int]) -> Sequence[int]:
        self.begun.set()
        self.go_on.wait(10)
        self.runs.append((key, items))
        if -1 in items:
            raise ValueError("a bad item")
        return [2 * item for item in items]


async def submitted(
    batcher: Batcher, run: Doubling, jobs: Sequence[tuple[Any, list[int]]]
) -> list[Any]:
    """The outcomes of jobs that wait behind a first one, and of that."""
    first = asyncio.ensure_future(batcher.submit("first", [0]))
    await asyncio.to_thread(run.begun.wait, 10)
    waiting = [asyncio.ensure_future(batcher.submit(*job)) for job in jobs]
    await asyncio.sleep(0.05)
    run.go_on.set()
    return list(await asyncio.gather(first, *waiting, return_exceptions=True))


def test_jobs_of_one_key_share_a_run_and_others_do_not() -> None:
    run, sizes = Doubling(), []
    batcher = Batcher(run, observe=sizes.append)
    jobs = [("a", [1]), ("b", [2, 3]), ("a", [4]), ("a", [5, 6])]
    outcomes = asyncio.run(submitted(batcher, run, jobs))
    batcher.close()
    assert outcomes == [[0], [2], [4, 6], [8], [10, 12]]
    assert run.runs == [("first", [0]), ("a", [1, 4, 5, 6]), ("b", [2, 3])]
    assert sizes == [1, 3, 1]


def test_no_run_is_larger_than_allowed() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=3)
    outcomes = asyncio.run(submitted(batcher, run, [("a", list(range(8))), ("a", [9])]))
    batcher.close()
    assert outcomes == [[0], [2 * n for n in range(8)], [18]]
    assert all(len(items) <= 3 for _, items in run.runs)


def test_a_bad_job_spoils_no_other() -> None:
    run = Doubling()
    batcher = Batcher(run)
    good, bad, other = asyncio.run(submitted(batcher, run, [("a", [1]), ("a", [-1]), ("a", [2])]))[
        1:
    ]
    batcher.close()
    assert (good, other) == ([2], [4])
    assert isinstance(bad, ValueError)


def test_an_index_out_of_reach_is_asked_once() -> None:
    class Away(Doubling):
        def __call__(self, key: Any, items: list[int]) -> Sequence[int]:
            doubled = super().__call__(key, items)
            if key == "a":
                raise IndexUnavailable("away")
            return doubled

    run = Away()
    batcher = Batcher(run)
    outcomes = asyncio.run(submitted(batcher, run, [("a", [n]) for n in range(3)]))
    batcher.close()
    assert all(isinstance(outcome, IndexUnavailable) for outcome in outcomes[1:])
    assert run.runs == [("first", [0]), ("a", [0, 1, 2])]


def test_a_full_queue_refuses() -> None:
    run = Doubling()
    batcher = Batcher(run, max_queue=2)
    outcomes = asyncio.run(submitted(batcher, run, [("a", [n]) for n in range(4)]))
    batcher.close()
    assert outcomes[1:3] == [[0], [2]]
    for refused in outcomes[3:]:
        assert isinstance(refused, RequestError)
        assert refused.status == 429


def test_a_job_that_nobody_waits_for_is_not_run() -> None:
    run = Doubling()
    batcher = Batcher(run)

    async def give_up() -> list[Any]:
        first = asyncio.ensure_future(batcher.submit("first", [0]))
        await asyncio.to_thread(run.begun.wait, 10)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batcher.submit("a", [1]), 0.05)
        run.go_on.set()
        return [await first, await batcher.submit("b", [2])]

    assert asyncio.run(give_up()) == [[0], [4]]
    batcher.close()
    assert [key for key, _ in run.runs] == ["first", "b"]


def test_no_patches_are_read_for_a_request_that_has_ended() -> None:
    limits, metrics = Limits(), Metrics()
    uploads = Uploads(limits, metrics, image_urls=False)
    encoder = Encoder([], uploads, limits, metrics, Batcher)
    read: list[int] = []
    begun, go_on = ([threading.Event() for _ in range(3)] for _ in range(2))

    def reading(number: int) -> np.ndarray:
        read.append(number)
        begun[number].set()
        assert go_on[number].wait(10)
        return np.full((1, 1, 1), number)

    async def ask() -> list[Any]:
        asked = [asyncio.ensure_future(encoder.patches(partial(reading, 0)))]
        await asyncio.to_thread(begun[0].wait, 10)
        asked += [asyncio.ensure_future(encoder.patches(partial(reading, n))) for n in (1, 2)]
        await asyncio.sleep(0.05)
        go_on[0].set()  # the other two wait
        await asyncio.to_thread(begun[1].wait, 10)
        asked[2].cancel()
        go_on[1].set()
        go_on[2].set()
        return list(await asyncio.gather(*asked, return_exceptions=True))

    *found, ended = asyncio.run(ask())
    encoder.close()
    uploads.close()
    assert read == [0, 1]
    assert [int(values.item()) for values, _ in found] == [0, 1]
    assert isinstance(ended, asyncio.CancelledError)
