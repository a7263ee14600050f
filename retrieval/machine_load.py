"""How much of the machine other programs take while something is timed: of its processors by their
work, of a GPU by the memory that they hold there."""

import os
import sys
import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

BUSY = 0.2  # share of the processors; an idle desktop's is below 0.05
# Of a GPU's memory, what torch's allocator does not count and no other program's work need be: some
# hundred MiB of this process's CUDA context and kernels, communicators of ranks, an idle desktop.
UNCOUNTED_BYTES = 2**30

_warned: set[Literal["processors", "gpu"]] = set()


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
    if share < BUSY:
        return False
    if tell:
        took = f"took {share:.0%} of this machine's processors meanwhile"
        _warn("processors", f"{took}: {what} may be worse than on a quiet machine")
    return True


def warn_if_shared(device: "torch.device", what: str) -> bool:
    """Whether other programs hold memory of that GPU, as who works there does; stderr is told once
    a process. what: as of `warn_if_busy`. False for a CPU. FAISS's indexes on the GPU, which torch
    does not count, pass for another program's."""
    if device.type != "cuda":
        return False
    import torch  # the album's program, which reads only the load, answers before it loads that

    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    if others < UNCOUNTED_BYTES:
        return False
    have = f"hold up to {others / 2**30:.1f} GiB of this GPU's memory"
    _warn("gpu", f"{have}: {what} may be worse than on a GPU of one's own")
    return True


def _warn(kind: Literal["processors", "gpu"], words: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        print(f"other programs {words}", file=sys.stderr, flush=True)


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
