"""Runs a program in a process that may be killed, and tells how it ended.

The processes are forked from a server that has imported everything, so a program starts in
milliseconds, with nothing verified and nothing cached of its own.
"""

import multiprocessing
import os
import pickle
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from data.errors import DataError, UsageError

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
PRELOADED = ("contrastive.train.loop", "retrieval.embed.bulk", "retrieval.photos.indexing",
             "retrieval.search.searcher", "retrieval.index.build", "timm", "open_clip",
             "transformers.models.bert", "lib.faults.readers")  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PRELOADED])

How = Literal["done", "told", "traceback", "killed", "crashed", "stuck"]
"""Ended well; with one sentence; with a traceback; by our SIGKILL; by another signal; not at all
within its time."""


@dataclass(frozen=True)
class Ended:
    how: How
    said: str  # the end of what it printed
    value: Any = None  # what the job returned


class Running:
    """A job in a process and session of its own."""

    def __init__(self, job: Callable[..., Any], *args: Any, file_bytes: int | None = None) -> None:
        """job: a module's function. file_bytes: longer files cannot be written."""
        self._folder = tempfile.TemporaryDirectory()
        self._started = time.monotonic()
        names = (str(Path(self._folder.name) / name) for name in ("out", "value"))
        self._out, self._value = names
        self._process: BaseProcess = CONTEXT.Process(
            target=_run, args=(job, args, self._out, self._value, file_bytes)
        )
        self._process.start()

    def kill_at(self, after_s: float) -> Ended:
        """SIGKILL to it and its children so long after its start, unless it has ended."""
        self._process.join(max(0.0, self._started + after_s - time.monotonic()))
        return self._end("killed")

    def wait(self, timeout_s: float = 120) -> Ended:
        self._process.join(timeout_s)
        return self._end("stuck")

    def _end(self, if_alive: How) -> Ended:
        alive = self._process.is_alive()
        pid = self._process.pid
        assert pid is not None
        if alive:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet in a session of its own
                os.kill(pid, signal.SIGKILL)
        self._process.join()
        code = self._process.exitcode
        said = Path(self._out).read_text(errors="replace") if Path(self._out).exists() else ""
        value = None
        if not alive and code == 0 and Path(self._value).exists():
            value = pickle.loads(Path(self._value).read_bytes())
        self._folder.cleanup()
        how: How = "done"
        if alive:
            how = if_alive
        elif code is None or code < 0:
            how = "crashed"
        elif code:
            how = "traceback" if "Traceback" in said else "told"
        return Ended(how, said[-2000:], value)


def run(job: Callable[..., Any], *args: Any, timeout_s: float = 120, **more: Any) -> Ended:
    """Start a job and wait for it."""
    return Running(job, *args, **more).wait(timeout_s)


def program(name: str, *arguments: object) -> None:
    """`python launch/NAME.py ARGUMENTS`, as a job."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    runpy.run_path(str(LAUNCH / f"{name}.py"), run_name="__main__")


def _run(
    job: Callable[..., Any], args: tuple[Any, ...], out: str, value: str, file_bytes: int | None
) -> None:
    os.setsid()
    with open(out, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    code = 0
    try:
        result = job(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        Path(value).write_bytes(pickle.dumps(result))
    except SystemExit as stopped:
        if stopped.code and not isinstance(stopped.code, int):
            os.write(2, str(stopped.code).encode())
        code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
    except (UsageError, DataError) as error:
        os.write(2, str(error).encode())
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        code = 1
    sys.stdout.flush()
    os._exit(code)  # no thread or exit handler of a library may change how it ended
