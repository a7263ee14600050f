"""What is drawn for a sample in an epoch, the same by whichever rank or worker."""

from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np
from jaxtyping import Int


def draw(count: int, seed: int, epoch: int, key: str, what: str = "") -> int:
    """A number from 0 to count - 1, uniform, a pure function of its arguments.

    what: any other word makes another, independent draw.
    """
    if count == 1:
        return 0
    drawn = draw_all(np.array([count]), seed, np.array([epoch]), lambda _: [key.encode()], what)
    return int(drawn[0])


def draw_several(
    counts: Int[np.ndarray, " b"],
    several: int,
    seed: int,
    epochs: Int[np.ndarray, " b"],
    keys_of: Callable[[Int[np.ndarray, " m"]], Iterable[bytes]],
) -> Int[np.ndarray, "b several"]:
    """Different numbers from 0 to count - 1 of each of many samples; the first is `draw_all`'s.

    Columns from a sample's count on mean nothing. keys_of: as for `draw_all`.
    """
    drawn = draw_all(counts, seed, epochs, keys_of)[:, None]
    for number in range(1, several):
        # one of those left, which becomes a number by stepping over those drawn
        found = draw_all((counts - number).clip(0), seed, epochs, keys_of, f"caption {number}")
        for taken in np.sort(drawn, axis=1).T:
            found += found >= taken
        drawn = np.column_stack([drawn, found])
    return drawn


def draw_all(
    counts: Int[np.ndarray, " b"],
    seed: int,
    epochs: Int[np.ndarray, " b"],
    keys_of: Callable[[Int[np.ndarray, " m"]], Iterable[bytes]],
    what: str = "",
) -> Int[np.ndarray, " b"]:
    """`draw` for many samples, 0 where a count is 0.

    keys_of: the keys of these rows, in UTF-8; not asked where there is nothing to draw.
    """
    drawn = np.zeros(len(counts), dtype=np.int64)
    rows = np.flatnonzero(counts > 1)
    if len(rows):
        own, end = epochs[rows].tolist(), what.encode()
        begun = {e: blake2b(f"{seed}/{e}/".encode(), digest_size=8).copy for e in set(own)}
        digests = []
        for epoch, key in zip(own, keys_of(rows), strict=True):
            state = begun[epoch]()  # a copy costs half of a new one
            state.update(key + end)
            digests.append(state.digest())
        drawn[rows] = np.frombuffer(b"".join(digests), ">u8") % counts[rows].astype(np.uint64)
    return drawn
