"""Progress, for who waits: a bar on a terminal, a plain line a minute in a log; and notices."""

import sys
from functools import lru_cache
from typing import Any

from tqdm import tqdm

EVERY_S = 60  # in a log; what takes less says nothing


class _Lines:
    """Takes what tqdm draws and writes it as lines; tqdm's monitor draws some of it again."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text and text != self._last:
            sys.stderr.write(f"{text}\n")
            self._last = text

    def flush(self) -> None:
        sys.stderr.flush()


class Progress(tqdm):
    """tqdm's bar where stderr is a terminal; in a log it counts, and says so every minute."""

    def __init__(self, *args: Any, disable: bool = False, **settings: Any) -> None:
        """As tqdm. disable: on the ranks that leave it to another to speak."""
        self._in_log = not sys.stderr.isatty()
        if self._in_log:
            line = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_noinv_fmt}{postfix}"
            settings |= {"file": _Lines(), "bar_format": line, "leave": False}
            settings |= {"mininterval": EVERY_S, "delay": EVERY_S}
        super().__init__(*args, disable=disable, **settings)  # type: ignore[call-overload]

    def set_postfix(
        self, ordered_dict: Any = None, refresh: bool | None = True, **figures: Any
    ) -> None:
        """As tqdm. In a log the next line has it."""
        super().set_postfix(ordered_dict, refresh and not self._in_log, **figures)


@lru_cache(maxsize=64)
def say_once(line: str) -> None:
    """One line on stderr, once a process."""
    print(line, file=sys.stderr, flush=True)
