"""What the deepspeed launcher tells a process; known before torch is imported."""

import os
import sys


def take_arguments() -> list[str]:
    """What the user typed after the program's name.

    The launcher's own `--local_rank=N`, which it puts first, is taken off `sys.argv` too.
    """
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    return sys.argv[1:]


def speaks() -> bool:
    """Whether this process is rank 0 (or alone), which prints for all."""
    return os.environ.get("RANK", "0") == "0"
