"""One program at a time in a run's folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from contrastive import distributed
from data.locks import take_lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Rank 0 holds the folder's lock for all ranks; it goes with its process.

    Raises `UsageError`, on all ranks, that names the program which holds it.
    """
    held: list[TextIO] = []
    distributed.from_main(lambda: held.append(take_lock(folder / ".lock", folder)))
    try:
        yield
    finally:
        for file in held:
            _give_back(folder, file)


def _give_back(folder: Path, file: TextIO) -> None:
    """Release the lock; a folder with nothing else in it, of a run that was refused, goes too."""
    with suppress(OSError):
        if os.listdir(folder) == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()
    file.close()
