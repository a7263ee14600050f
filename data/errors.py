"""Errors that are the user's to mend: one sentence, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A value that cannot work. The message is one sentence: the value, and what is allowed."""


@contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Turn a `UsageError` into one line on stderr (rank 0 only) and exit status 2."""
    try:
        yield
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
