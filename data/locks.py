"""One program at a time writes a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from data.errors import UsageError, make_folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being made; it lies beside it and goes with its process.

    Raises `UsageError` that names the program which holds it.
    """
    file = take_lock(folder.parent / f".{folder.name}.lock", folder)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(file.name)
        file.close()


def take_lock(path: Path, folder: Path) -> TextIO:
    """Lock a file, made where missing, in whose name `folder` is written; it notes who holds it.

    Raises `UsageError` that names the program which holds it. File systems without locks allow
    everything.
    """
    make_folder(path.parent)
    file = open(path, "a+")  # noqa: SIM115
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
        return file
    if not _is_there(path, file):  # removed by its last holder since it was opened
        file.close()
        return take_lock(path, folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _is_there(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False
