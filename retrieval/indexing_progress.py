"""How far an index is that is being made while it is served."""

import time
from collections import deque
from dataclasses import dataclass

from retrieval.detail import Detail

RATE_S = 30.0


@dataclass(frozen=True)
class IndexingProgress:
    """What a page shows, "1,234 of 50,000 photos"."""

    patch_size: Detail  # at which photos are embedded now
    done: int  # photos that have a vector at it, or were skipped
    total: int  # photos; 0: not known yet
    seconds_left: float | None = None  # None: not known yet
    problem: str = ""  # a sentence where it goes on no more


class TimeLeft:
    """By the rate of the last `RATE_S`: what is known from an earlier run goes by in no time."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # seconds, photos done

    def __call__(self, done: int, total: int) -> float | None:
        """Seconds, None where not known. To be asked whenever more is done."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_S:
            self._seen.popleft()
        start, before = self._seen[0]
        made = done - before
        return round((now - start) / made * (total - done), 1) if made > 0 else None
