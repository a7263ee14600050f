"""What the loaders' worker processes do about signals, and about what they cannot hand over."""

import atexit
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import sys
from typing import Any


def begin_worker(_: int) -> None:
    """For a worker's start: Ctrl-C and the launcher's SIGTERM reach workers too, but what they end
    is their parent's to say, and it may need them for its last step.

    A worker that cannot hand over what it has read, for want of shared memory, ends: its parent
    would wait for ever.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_end)


def _end(error: Exception, _: object) -> None:
    print(f"a loader process: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@atexit.register  # after multiprocessing.util's, so before it: that one would wait for them
def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
