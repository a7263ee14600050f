"""How much of the machine other programs take while something is timed."""

import os
import sys
import time

BUSY = 0.2  # share of the processors; an idle desktop's is below 0.05

_warned = False


class OthersLoad:
    """What other programs take of the processors, from the moment this is made."""

    def __init__(self) -> None:
        self._before = _seconds()

    def share(self) -> float:
        """0 to 1, on average since then; 0 where the system does not say (Linux does)."""
        all_s, busy_s, own_s = (
            now - then for now, then in zip(_seconds(), self._before, strict=True)
        )
        return min(1.0, max(0.0, busy_s - own_s) / all_s) if all_s > 0 else 0.0


def warn_if_busy(share: float, what: str, tell: bool = True) -> bool:
    """Whether others took too much for a measurement to be trusted; stderr is told once a process.

    what: was measured, in the plural. tell: whether it is; who looks for photos measures nothing.
    """
    global _warned
    if share < BUSY:
        return False
    if tell and not _warned:
        _warned = True
        print(
            f"other programs took {share:.0%} of this machine's processors meanwhile: {what} may "
            "be worse than on a quiet machine",
            file=sys.stderr,
            flush=True,
        )
    return True


def queued_s() -> float:
    """Seconds that this thread could have run while others did, since it began; 0 where the system
    does not say (Linux does)."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _seconds() -> tuple[float, float, float]:
    """Since the start: of all processors, of those the busy ones, and of this process's threads."""
    own_s = time.process_time()
    try:
        with open("/proc/stat") as file:
            ticks = [int(number) for number in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0, own_s
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    idle = sum(ticks[3:5])  # idle, and idle while a disk works
    return tick_s * sum(ticks), tick_s * (sum(ticks) - idle), own_s
