"""A thread that reads ahead: the same items, the same errors, and nothing left of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.pipeline.prefetch import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_are_the_same_and_made_by_one_thread_ahead_of_their_use():
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            assert threading.current_thread().name == "prefetch"
            yield number

    state = torch.get_rng_state()
    for expected, number in enumerate(prefetched(items())):
        assert number == expected
        assert len(made) <= number + 4  # in use, ready, waiting for room
        deadline = time.monotonic() + 10
        while len(made) < min(number + 2, 20) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) >= min(number + 2, 20)
    assert number == 19
    assert torch.equal(torch.get_rng_state(), state)
    assert not threads()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error):
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    got: list[int] = []
    with pytest.raises(type(error)) as raised:
        deque(map(got.append, prefetched(items())), maxlen=0)
    assert raised.value is error
    assert got == [1, 2]
    assert not threads()


def test_the_thread_ends_where_the_loop_does():
    def endless() -> Iterator[int]:
        while True:
            yield 0

    def use() -> None:
        for _ in prefetched(endless()):
            raise OSError("the loop's own")

    with pytest.raises(OSError, match="own"):
        use()
    assert not threads()
    items = prefetched(endless())
    next(items)
    assert threads()
    items.close()
    assert not threads()


def test_a_signal_reaches_a_loop_that_waits():
    def slow() -> Iterator[int]:
        yield 0
        time.sleep(0.5)
        yield 1

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        items = prefetched(slow())
        next(items)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(items)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not threads()


def test_no_child_is_forked_while_an_item_is_made():
    """It would inherit the thread's locks, and nobody to release them."""
    lock = threading.Lock()

    def items() -> Iterator[int]:
        while True:
            with lock:
                time.sleep(0.001)
            yield 0

    numbers = prefetched(items())
    for _ in range(30):
        next(numbers)
        child = os.fork()
        if child == 0:
            os._exit(0 if lock.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0
    numbers.close()


def test_a_program_ends_whatever_is_read_ahead():
    program = """
import itertools
from data.pipeline.prefetch import prefetched
items = prefetched(itertools.count())
print(next(items), next(items))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0 1\n", "")
