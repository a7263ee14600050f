"""Start programs as users do: under the deepspeed launcher, in processes of their own."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def deepspeed(
    num_ranks: int, program: Path, *arguments: str, timeout_s: int = 400
) -> subprocess.CompletedProcess[str]:
    """`deepspeed --num_accelerators N PROGRAM ARGUMENTS`; returns the completed process."""
    command = deepspeed_command(num_ranks, program, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)


def deepspeed_command(num_ranks: int, program: Path, *arguments: str) -> list[str]:
    """That command, at a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators"]
    return [*command, str(num_ranks), "--master_port", str(port), str(program), *arguments]
