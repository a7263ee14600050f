"""One program at a time in a run's folder, whatever its number of ranks."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from contrastive import distributed
from data.locks import only_writer, take_lock


@contextmanager
def locked(folder: Path, beside: bool = False) -> Iterator[None]:
    """Rank 0 holds the folder's lock for all ranks; it goes with its process.

    beside: the lock does not lie in the folder, which is made by another name. Raises `UsageError`,
    on all ranks, that names the program which holds it.
    """
    hold = only_writer if beside else _hold_inside
    with ExitStack() as held:
        distributed.from_main(lambda: held.enter_context(hold(folder)))
        yield


@contextmanager
def _hold_inside(folder: Path) -> Iterator[None]:
    """A folder with nothing but the lock in it, of a run that was refused, goes with it."""
    file = take_lock(folder / ".lock", folder)
    try:
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
        file.close()
