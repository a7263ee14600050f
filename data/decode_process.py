"""The process that `data.decode_apart` starts: it decodes images one by one, each within limits.

A request is `REQUEST` and the file; the answer a line of JSON (`size`, or `kind` and `cause`) and
the RGB pixels.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import IO

from data.decode_apart import REQUEST
from data.images import load_rgb, open_image
from data.problems import BadSample

# What an image may take, by its header: processor time, and memory beyond that of the process.
S_PER_PIXEL = 2e-7
BASE_BYTES, BYTES_PER_PIXEL = 256 << 20, 24
WALL_FACTOR = 5  # on a busy machine a second of the processor takes longer


def main() -> None:
    """Answer requests until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _set_up_pillow()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while header := requests.read(REQUEST.size):
        num_bytes, max_pixels, base_s = REQUEST.unpack(header)
        _answer(requests.read(num_bytes), max_pixels, base_s, replies)


def _answer(data: bytes, max_pixels: int, base_s: float, replies: IO[bytes]) -> None:
    try:
        _limit(base_s, 0, len(data))
        image = open_image(data, max_pixels)
        _limit(base_s, image.width * image.height, len(data))
        rgb = load_rgb(image)
    except BadSample as bad:
        reply, pixels = _problem(bad.kind, bad.cause), b""
    except MemoryError:
        reply, pixels = _problem("image_too_costly", "decoding it takes too much memory"), b""
    else:
        _limit(base_s, rgb.width * rgb.height, len(data))
        reply, pixels = json.dumps({"size": rgb.size}), rgb.tobytes()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    replies.write(reply.encode() + b"\n")
    replies.write(pixels)
    replies.flush()


def _problem(kind: str, cause: str) -> str:
    return json.dumps({"kind": kind, "cause": cause})


def _limit(base_s: float, num_pixels: int, num_bytes: int) -> None:
    """From now on. Past the time the process ends; past the memory `MemoryError` is raised."""
    limit_s = base_s + S_PER_PIXEL * num_pixels
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * limit_s)
    with suppress(OSError, ValueError), open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
        most = now + BASE_BYTES + BYTES_PER_PIXEL * num_pixels + 2 * num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _set_up_pillow() -> None:
    """What the limits allow, and one thread: the time is the processor's."""
    from PIL import AvifImagePlugin, PngImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
