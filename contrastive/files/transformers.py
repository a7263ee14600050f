"""Loading from transformers without its progress bars, and its long errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within it transformers draws no bar: for a file on disk it is over before it is read."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Of its message, which explains over several lines what one may try."""
    return str(error).strip().splitlines()[0]
