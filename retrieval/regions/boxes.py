"""Parts of a picture: boxes in its own coordinates, and the windows that are indexed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from data.errors import UsageError


class Box(NamedTuple):
    """A part of a picture as it is shown, from 0 to 1: x from its left, y from its top."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Box(0.0, 0.0, 1.0, 1.0)
MOST_WINDOWS = 256  # of a picture


def overlapping_windows(per_side: int) -> list[Box]:
    """Windows evenly over the picture, row by row, as large as overlapping by half makes them."""
    side = 2 / (per_side + 1)
    starts = [number * (1 - side) / max(1, per_side - 1) for number in range(per_side)]
    return [Box(x, y, x + side, y + side) for y in starts for x in starts]


def check_windows(windows: Sequence[int]) -> None:
    """Raise `UsageError` for what no picture is cut into."""
    count = sum(each * each for each in windows)
    if any(each < 1 for each in windows) or count > MOST_WINDOWS:
        raise UsageError(
            f"windows {tuple(windows)}: how many a side, each 1 or more, and at most "
            f"{MOST_WINDOWS} in all, not {count}"
        )


WINDOWS = (*overlapping_windows(2), *overlapping_windows(3))
"""2 x 2 that overlap by half, and 3 x 3 that do: a thing of up to a third of the picture's sides is
whole in some window of the first, one of up to a quarter in one of the second."""


def check_box(box: Any) -> Box:
    """Raises `UsageError` for what is no part of a picture."""
    numbers = isinstance(box, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in box
    )
    if numbers and len(box) == 4:
        found = Box(*map(float, box))
        if 0 <= found.left < found.right <= 1 and 0 <= found.top < found.bottom <= 1:
            return found
    raise UsageError(
        f"box {str(box)[:80]}: allowed are four numbers from 0 to 1, left, top, right and bottom, "
        "left below right and top below bottom"
    )
