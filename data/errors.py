"""Errors that are the user's to mend: one sentence, no traceback."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """A value that cannot work. The message is one sentence: the value, and what is allowed."""


class DataError(RuntimeError):
    """Data that cannot be used, where the user asked not to skip it. One sentence."""


def make_folder(path: str | Path) -> None:
    """Create the folder that --out names; `UsageError` where it cannot be written in."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path} cannot be written in")


@contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Turn a `UsageError` or `DataError` into one line on stderr and exit status 2.

    Of several ranks the first speaks. Another waits, and speaks only if the launcher has not
    ended it meanwhile, as it does within a second when rank 0 met the same error.
    """
    try:
        yield
    except (UsageError, DataError) as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(4)
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
