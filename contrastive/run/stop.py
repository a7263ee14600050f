"""SIGINT and SIGTERM end a run between two steps, on all ranks after the same one."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from contrastive.distributed import LaggingMax
from contrastive.run.config import RunConfig
from data.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BURST_S = 2.0  # within which one Ctrl-C may arrive several times: the launcher sends SIGTERM too


def stopped(number: int, step: int, cfg: RunConfig) -> Stopped:
    """What a run raises that a signal ended after `step`."""
    return Stopped(
        f"stopped by {signal.Signals(number).name} after step {step} of {cfg.steps}, which is "
        f"saved; go on with resume={cfg.folder}",
        number,
    )


class StopSignal:
    """Within this context the signals are noted; a later second SIGINT interrupts at once.

    Python takes signals in the main thread alone; in another nothing is noted.
    """

    def __enter__(self) -> "StopSignal":
        self._asked, self._since = 0, 0.0
        self._among_ranks = LaggingMax()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._among_ranks.finish()
        if self._asked and "RANK" in os.environ:
            return  # with the first rank that ends, the launcher sends SIGTERM to the others
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after_step(self) -> int:
        """The signal upon which to stop now, 0 for none: the same on all ranks, which learn of it
        a step later. All ranks call it once a step."""
        return self._among_ranks(self._asked)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._asked:
            self._asked, self._since = number, now
        elif number == signal.SIGINT and now - self._since > BURST_S:
            raise KeyboardInterrupt
