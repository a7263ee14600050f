"""Decoding in a process of its own, which ends where an image takes too much time or memory.

For the few files of which a look at the header cannot tell (`data.image_headers.is_ordinary`). The
process, `data.decode_process`, stays for the next image; while at work it belongs to one thread.
"""

import atexit
import json
import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress

from PIL import Image

from data.problems import BadSample

BASE_S = 2.0  # seconds of one processor that any image may take; `decode_process` adds by its size

REQUEST = struct.Struct("<QQd")  # bytes of the file, most pixels, `BASE_S`
_idle: dict[int, list[subprocess.Popen[bytes]]] = {}  # by process: a fork has none of its own


def decode_apart(data: bytes, max_pixels: int) -> Image.Image:
    """As `data.images.decode_image`, which calls it. Raises `BadSample`, "image_too_costly" among
    them. Safe for threads and forks."""
    process = _take()
    try:
        reply = _ask(process, data, max_pixels)
    except (OSError, ValueError):
        process.kill()
        raise _ended(process) from None
    _idle[os.getpid()].append(process)
    if isinstance(reply, BadSample):
        raise reply
    return reply


def _take() -> "subprocess.Popen[bytes]":
    idle = _idle.setdefault(os.getpid(), [])
    with suppress(IndexError):
        while True:
            if (process := idle.pop()).poll() is None:
                return process
            _close(process)
    path = f"import sys; sys.path[:] = {sys.path!r}; "
    return subprocess.Popen(
        [sys.executable, "-c", path + "from data.decode_process import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the program that asks
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _ask(
    process: "subprocess.Popen[bytes]", data: bytes, max_pixels: int
) -> Image.Image | BadSample:
    """Raises `OSError` or `ValueError` where the process ends instead of answering."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(REQUEST.pack(len(data), max_pixels, BASE_S))
    process.stdin.write(data)
    process.stdin.flush()
    reply = json.loads(process.stdout.readline())
    if "kind" in reply:
        return BadSample(reply["kind"], reply["cause"])
    width, height = reply["size"]
    return Image.frombytes("RGB", (width, height), process.stdout.read(3 * width * height))


def _ended(process: "subprocess.Popen[bytes]") -> BadSample:
    _close(process)
    if -process.returncode in (signal.SIGPROF, signal.SIGALRM):
        return BadSample("image_too_costly", "decoding it takes too long for its pixels")
    return BadSample("not_an_image", f"its decoder ended with status {process.returncode}")


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()


@atexit.register
def _close_idle() -> None:
    for process in _idle.pop(os.getpid(), []):
        _close(process)
