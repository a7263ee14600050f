"""What the deepspeed launcher tells a process; known before torch is imported."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

GRACE_S = 120  # for the last step and its checkpoint, once the launcher is gone


def take_arguments() -> list[str]:
    """What the user typed after the program's name.

    The launcher's own `--local_rank=N`, which it puts first, is taken off `sys.argv` too.
    """
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    return sys.argv[1:]


def speaks() -> bool:
    """Whether this process is rank 0 (or alone), which prints for all."""
    return os.environ.get("RANK", "0") == "0"


def end_with_launcher(poll_s: float = 1.0) -> None:
    """Send this rank SIGTERM when the launcher is gone, however that was killed.

    `deepspeed` starts a launcher per machine, which starts the ranks; a SIGTERM to `deepspeed` ends
    it alone.
    """
    ancestors = [os.getppid()]
    above = _parent(ancestors[0])
    if above is not None and b"deepspeed" in _command(above):
        ancestors.append(above)

    def gone() -> bool:
        if os.getppid() != ancestors[0]:
            return True
        return len(ancestors) > 1 and _parent(ancestors[0]) != ancestors[1]

    def watch() -> None:
        while not gone():
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with launcher", daemon=True).start()


def _parent(pid: int) -> int | None:
    """A process's parent; None where the system does not say."""
    try:
        # pid (name) state parent ...; a name may hold spaces and brackets
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
