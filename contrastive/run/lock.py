"""One program at a time in a run's folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from contrastive import distributed
from data.errors import UsageError, make_folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Rank 0 holds the folder's lock for all ranks; it goes with its process.

    Raises `UsageError`, on all ranks, that names the program which holds it.
    """
    held: list[TextIO] = []
    distributed.from_main(lambda: held.append(_take(folder)))
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


def _take(folder: Path) -> TextIO:
    make_folder(folder)
    file = open(folder / ".lock", "a+")  # noqa: SIM115
    try:
        # Of the process, not of the open file: loader workers, which may outlive a killed rank by
        # seconds, do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "another program"
        file.close()
        raise UsageError(
            f"{folder} is being written by {holder}; wait for its end, or give another name"
        ) from error
    except OSError:
        return file  # a file system without locks
    if not _is_there(folder / ".lock", file):  # removed by its last holder since it was opened
        file.close()
        return _take(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _is_there(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False
