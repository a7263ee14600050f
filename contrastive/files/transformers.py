"""Loading from transformers: without progress bars, errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide progress bars; local loads finish too fast to need one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """First line of the error; the rest is advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
