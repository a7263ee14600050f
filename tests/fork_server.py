"""A process that has imported what takes long, and forks programs that begin with it.

    python tests/fork_server.py FD MODULE...

FD is a socket of tests/forked.py. A message is a JSON object with `argv` (as after `python`),
`env`, `cwd`, and whether it starts a `session`; three files come with it: stdout, stderr, and a
pipe for the program's number and, once it has ended, its exit status.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from typing import Any

MESSAGE_BYTES = 1 << 20


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every message, until the other side is gone. Returns in the forked process alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that `watch`
    while True:
        message, files, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return json.loads(message), files
        for file in files:
            os.close(file)


def watch(status: int, session: bool) -> None:
    """Fork once more, and tell the program's number and exit status. Returns in the program."""
    pid = os.fork()
    if pid == 0:
        if session:
            os.setsid()
        os.write(status, f"{os.getpid()}\n".encode())
        os.close(status)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\n".encode())
    os._exit(0)


def execute(what: str, *arguments: str) -> None:
    """A file, or -c and code, as `python` does."""
    if what != "-c":
        sys.path[0] = os.path.dirname(os.path.abspath(what))
        sys.argv = [what, *arguments]
        runpy.run_path(what, run_name="__main__")
        return
    sys.path[0] = ""
    sys.argv = ["-c", *arguments[1:]]
    exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})


def end(code: Any) -> None:
    """Threads and functions that Python waits for and calls at its end, without freeing memory."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # no program looks through all of it, or copies its memory
    request, (stdout, stderr, status) = serve(control)
    watch(status, request["session"])
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code: Any = 0
    try:
        execute(*request["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end(code)


if __name__ == "__main__":
    main()
