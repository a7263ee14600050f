"""Python programs in processes of their own that need not import again what takes long.

They are forked from a process (tests/fork_server.py), and otherwise as `python PROGRAM` is. What
a program imports, what it reads from its environment meanwhile, and the launcher are tested with
`subprocess`.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

SERVER = Path(__file__).with_name("fork_server.py")
LIGHT = ("numpy", "tqdm", "tyro")
"""What every program imports."""
# Without what starts threads or looks for a GPU, neither of which a fork may inherit.
HEAVY = (
    "deepspeed", "open_clip", "transformers.models.bert.modeling_bert", "torch.utils.tensorboard",
    "contrastive.flexify.loop", "contrastive.train.loop", "retrieval.embed.bulk",
    "retrieval.evaluation.evaluate", "retrieval.index.build", "retrieval.photos.indexing",
    "retrieval.search.searcher",
)  # fmt: skip
"""What those that train, embed or search do."""


class Process:
    """A program that was started; what it prints is kept in files."""

    def __init__(self, pid_and_status: int, stdout: int, stderr: int) -> None:
        self._status, self._files = os.fdopen(pid_and_status), (stdout, stderr)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def fileno(self) -> int:
        """For `select`: it can be read once the program has ended."""
        return self._status.fileno()

    def send_signal(self, number: int) -> None:
        if not select.select([self], [], [], 0)[0]:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """stdout and stderr, once it has ended. Raises `subprocess.TimeoutExpired`."""
        if not select.select([self], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        self.returncode = int(self._status.readline())
        self._status.close()
        said = []
        for file in self._files:
            os.lseek(file, 0, os.SEEK_SET)
            with os.fdopen(file, "rb") as stream:
                said.append(stream.read().decode())
        return said[0], said[1]


_lock = threading.Lock()
_connections: dict[tuple[str, ...], socket.socket] = {}


def _server(imported: tuple[str, ...]) -> socket.socket:
    """The connection to this test run's server, which ends with it."""
    with _lock:
        if imported not in _connections:
            _connections[imported] = _connect(imported)
        return _connections[imported]


def _connect(imported: tuple[str, ...]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-u", str(SERVER), str(theirs.fileno()), *imported]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)  # a child that the tests forked may hold a copy
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def start(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    start_new_session: bool = False,
    imported: tuple[str, ...] = HEAVY,
) -> "Process | subprocess.Popen[str]":
    """`python ARGUMENTS`: a file, or -c and code, and what follows.

    env replaces this process's. Python starts anew where there is a GPU, which no fork can share,
    and on other systems than Linux.
    """
    environment, folder = dict(os.environ if env is None else env), str(cwd or Path.cwd())
    argv = [str(argument) for argument in arguments]
    if sys.platform != "linux" or (imported is HEAVY and torch.cuda.is_available()):
        return subprocess.Popen(
            [sys.executable, "-u", *argv], env=environment, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=start_new_session,
        )  # fmt: skip
    request = {"argv": argv, "env": environment, "cwd": folder, "session": start_new_session}
    stdout, stderr = (os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR) for _ in range(2))
    mine, status = os.pipe()
    socket.send_fds(_server(imported), [json.dumps(request).encode()], [stdout, stderr, status])
    os.close(status)
    return Process(mine, stdout, stderr)


def run(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout_s: float = 400,
    imported: tuple[str, ...] = HEAVY,
) -> subprocess.CompletedProcess[str]:
    """As `start`, until its end."""
    process = start(*arguments, env=env, cwd=cwd, imported=imported)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        raise
    code = process.returncode or 0
    return subprocess.CompletedProcess([str(a) for a in arguments], code, stdout, stderr)


def ranks(
    count: int, program: Path, *arguments: str, cwd: Path | None = None, timeout_s: float = 400
) -> subprocess.CompletedProcess[str]:
    """What `deepspeed --num_accelerators COUNT PROGRAM ARGUMENTS` starts, without the launcher.

    As it does, end the others with the first that fails, whose exit status counts.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    shared |= {"WORLD_SIZE": count, "LOCAL_SIZE": count}
    if count > torch.cuda.device_count():
        shared["CUDA_VISIBLE_DEVICES"] = ""
    started = []
    for rank in range(count):
        own = {name: str(value) for name, value in shared.items()}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        flag = f"--local_rank={rank}"
        started.append(start(program, flag, *arguments, env=os.environ | own, cwd=cwd))
    left, said, code, end = list(started), ["", ""], 0, time.monotonic() + timeout_s
    while left:
        for process in left[:]:
            try:
                stdout, stderr = process.communicate(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            left.remove(process)
            said = [said[0] + stdout, said[1] + stderr]
            if process.returncode and not code:
                code, end = process.returncode, min(end, time.monotonic() + 30)
                for other in left:
                    other.send_signal(signal.SIGTERM)
        if time.monotonic() > end:
            for process in left:
                process.send_signal(signal.SIGKILL)
            code = code or -signal.SIGKILL
            end = time.monotonic() + 30
    return subprocess.CompletedProcess([program, *arguments], code, *said)


def gradients_of_two_ranks(
    folder: Path,
    text: str,
    tower: str,
    cases: Mapping[str, dict[str, object]],
    trainings: Sequence[Mapping[str, object]] = (),
) -> Path:
    """What tests/rank_program.py writes into the folder, all cases in one launch. Returns it."""
    gradients = {name: case | {"tower": tower} for name, case in cases.items()}
    job = {"text": text, "gradients": gradients, "trainings": trainings}
    (folder / "job.json").write_text(json.dumps(job))
    done = ranks(2, SERVER.with_name("rank_program.py"), str(folder / "job.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
