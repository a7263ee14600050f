"""One thread that makes the next items ready while the current one is used."""

import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

# Held while an item is made, and while the process forks: a child (a loader worker) would inherit
# whatever lock the thread holds, Arrow's and malloc's too, and nobody to release it.
_making = threading.RLock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)


def prefetched(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """The same items, `depth` of them made ahead by a thread.

    What `items` raises is raised here, after the items before it. The thread ends when these are
    used up, closed or dropped, and never keeps a program from ending.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def make() -> None:
        more = True
        while more and not stop.is_set():
            try:
                with _making:
                    item: tuple[bool, T | BaseException | None] = (True, next(items))
            except StopIteration:
                item, more = (False, None), False
            except BaseException as error:  # handed over, and raised by the consumer
                item, more = (False, error), False
            ready.put(item)
            del item  # or it would stay in memory while the next one is made

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            good, item = ready.get()
            if good:
                yield item  # type: ignore[misc]
                del item
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        stop.set()
        while thread.is_alive() and not sys.is_finalizing():  # it may wait for room
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue
