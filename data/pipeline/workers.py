"""What the loaders' worker processes do about signals."""

import atexit
import multiprocessing
import multiprocessing.util
import signal


def outlive_signals(_: int) -> None:
    """For a worker's start: Ctrl-C and the launcher's SIGTERM reach workers too, but what they end
    is their parent's to say, and it may need them for its last step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after multiprocessing.util's, so before it: that one would wait for them
def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
