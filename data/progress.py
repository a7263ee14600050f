"""Progress bars, for the eyes of who waits: none is written where stderr is no terminal."""

from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm's bar on a terminal; in a log it counts in silence."""

    def __init__(self, *args: Any, disable: bool = False, **settings: Any) -> None:
        """As tqdm. disable: on the ranks that leave it to another to speak."""
        super().__init__(*args, disable=disable or None, **settings)  # type: ignore[call-overload]
