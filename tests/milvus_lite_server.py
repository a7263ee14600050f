"""Milvus Lite (in .venv-interop/milvus) as a server in a process of its own."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

LITE = Path(__file__).parents[1] / ".venv-interop/milvus/bin/milvus-lite"
START_S = 60.0


class LiteServer:
    """A server that can be stopped, held, and started again on the same data."""

    def __init__(self, data: Path) -> None:
        """Raises RuntimeError where Milvus Lite is not installed, or does not start."""
        if not LITE.is_file():
            raise RuntimeError(f"{LITE} is missing; `make interop` installs it")
        self.data, self.port = data, _free_port()
        self.start()

    def start(self) -> None:
        command = [LITE, "server", "--data-dir", self.data, "--host", "127.0.0.1"]
        with open(self.data.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--port", str(self.port)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while not _answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.data.with_suffix(".log").read_text()[-2000:])
            time.sleep(0.05)

    def address(self, name: str) -> str:
        return f"milvus:http://127.0.0.1:{self.port}/{name}"

    def hold(self, held: bool) -> None:
        """Let it answer nothing, or go on."""
        os.kill(self._process.pid, signal.SIGSTOP if held else signal.SIGCONT)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)

    def kill(self) -> None:
        """Without a chance to tidy up."""
        self._process.kill()
        self._process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
