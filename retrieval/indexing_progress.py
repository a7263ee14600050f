"""How far an index is that is being made while it is served."""

from dataclasses import dataclass


@dataclass(frozen=True)
class IndexingProgress:
    """What a page shows, "1,234 of 50,000 photos"."""

    patch_size: int  # at which photos are embedded now
    done: int  # photos that have a vector at it, or were skipped
    total: int  # photos
    seconds_left: float | None = None  # None: not known yet
