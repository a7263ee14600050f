"""Ranks that others wait for in vain: one sentence instead of for ever, or a traceback."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from forked import Process
from forked import start as start_forked

from contrastive import distributed
from data.errors import DataError

PROGRAM = Path(__file__).parent / "silent_program.py"


def start(rank: int, of: int, port: int, *arguments: str) -> Process | subprocess.Popen[str]:
    """A rank, without the launcher around it that would end the others with the first."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(of), "LOCAL_SIZE": str(of)}
    env = {**os.environ, **where, **ranks, "CUDA_VISIBLE_DEVICES": ""}
    return start_forked(PROGRAM, *arguments, env=env)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_words(rank: Process | subprocess.Popen[str]) -> str:
    """Its error, on exit status 2."""
    _, said = rank.communicate(timeout=240)
    assert rank.returncode == 2, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_rank_that_hangs_is_named_in_a_sentence() -> None:
    port = free_port()
    ranks = [start(rank, 2, port, "3", "SIGSTOP") for rank in range(2)]
    try:
        assert last_words(ranks[0]).startswith(
            "error: rank 1 did not answer for 0.05 minutes (DEEPSPEED_TIMEOUT sets how many); it "
            "hangs or its machine is gone"
        )
    finally:
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].communicate()


def test_a_rank_that_is_gone_has_said_why_itself() -> None:
    with pytest.raises(DataError, match="another rank is gone"), distributed.launched():
        raise RuntimeError("[.../gloo/transport/tcp/pair.cc:545] Connection reset by peer")
    with pytest.raises(RuntimeError, match="some bug"), distributed.launched():
        raise RuntimeError("some bug")


def test_a_port_that_is_taken_is_told_with_the_flag_that_gives_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = last_words(start(0, 2, port, "3", "SIGSTOP"))
    assert said.startswith(f"error: port {port} is taken, maybe by another training")
    assert f"deepspeed --master_port {port + 1}" in said
