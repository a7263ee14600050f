"""Images and connections that are meant to hold the service, beside good requests."""

import base64
import http.client
import io
import json
import resource
import socket
import struct
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from data.shards.tar import add_member
from lib.faults import readers
from lib.faults.processes import program, run
from lib.faults.tally import Tally
from lib.faults.world import World, must
from lib.synthetic_index import serving

ANSWER_S = 60.0  # for anything: the service's own limit is 30
MEMORY_MIB = 700.0  # that hostile requests may add


def many_scans(scans: int = 60_000, side: int = 2048) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a pass over all blocks."""
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, "JPEG", progressive=True)
    jpeg = out.getvalue()
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * scans + jpeg[-2:]


def huge_tile(side: int = 20_000) -> bytes:
    """A TIFF of 64 x 64 pixels in one deflated tile of so many squared."""
    import zlib

    squeeze = zlib.compressobj(9)
    data = b"".join(squeeze.compress(bytes(side * 3)) for _ in range(side)) + squeeze.flush()
    short, long_ = 3, 4
    tags: list[tuple[int, int, int, int]] = [
        (256, long_, 1, 64), (257, long_, 1, 64), (258, short, 1, 8), (259, short, 1, 8),
        (262, short, 1, 2), (277, short, 1, 3), (322, long_, 1, side), (323, long_, 1, side),
        (324, long_, 1, 8 + 2 + 12 * 10 + 4), (325, long_, 1, len(data)),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return head + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + data


def floats(side: int = 9_000) -> bytes:
    """A TIFF of compressed 32-bit floats."""
    out = io.BytesIO()
    Image.new("F", (side, side)).save(out, "TIFF", compression="tiff_deflate")
    return out.getvalue()


def hostile_images() -> dict[str, bytes]:
    return {"60,000 scans": many_scans(), "one huge tile": huge_tile(), "floats": floats()}


def hold_service(world: World, silent: int) -> Iterator[Tally]:
    """Hostile images, heads and silent connections; good requests are answered meanwhile."""
    images = hostile_images()
    index = world.root / "index"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as most systems begin
    with serving(index, "--device", "cpu") as (port, server):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * silent), hard))
        _ask(port, {"text": "a cat", "k": 3})
        before = _peak_mib(server.pid)
        tally = Tally("images that hold the service")
        with ThreadPoolExecutor(16) as pool:
            for name, image in images.items():
                body = {"image": base64.b64encode(image).decode(), "k": 3}
                bad = [pool.submit(_ask, port, body) for _ in range(4)]
                time.sleep(0.5)
                good = [_ask(port, {"image": _good(), "k": 3}) for _ in range(3)]
                statuses = [ask.result()[0] for ask in bad]
                _judge(tally, name, statuses, good, _peak_mib(server.pid) - before)
        yield tally

        tally = Tally("connections that hold the service")
        status = _long_head(port, 200 << 20)
        added = _peak_mib(server.pid) - before
        good = [_ask(port, {"text": "a cat", "k": 3})]
        if good[0][0] == 200 and added <= MEMORY_MIB:
            tally.add("noticed")
        else:
            tally.add("lost", f"head of 200 MiB: {status}, {added:.0f} MiB, {good}")
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(silent)]
        answered = [_ask(port, {"text": "a cat", "k": 3})[0] for _ in range(20)]
        for connection in held:
            connection.close()
        refused = [status for status in answered if status != 200]
        tally.add("lost" if refused else "noticed", f"{silent} silent connections: {answered}")
        yield tally

        tally = Tally("SIGTERM while images hold the service")
        with ThreadPoolExecutor(4) as pool:
            body = {"image": base64.b64encode(images["60,000 scans"]).decode(), "k": 3}
            waiting = [pool.submit(_ask, port, body) for _ in range(4)]
            time.sleep(0.5)
            server.terminate()
            started = time.monotonic()
            try:
                server.wait(ANSWER_S)
                tally.add("harmless")
            except Exception:
                tally.add("lost", f"alive {time.monotonic() - started:.0f} s after SIGTERM")
                server.kill()
            for ask in waiting:
                ask.result()
        yield tally


def _judge(
    tally: Tally,
    name: str,
    statuses: list[int],
    good: list[tuple[int, float]],
    added: float,
) -> None:
    fine = all(status == 200 and seconds < ANSWER_S for status, seconds in good)
    refused = all(400 <= status < 500 or status == 200 for status in statuses)
    if fine and refused and added <= MEMORY_MIB:
        tally.add("noticed")
    else:
        tally.add("lost", f"{name}: {statuses}, good requests {good}, {added:.0f} MiB more")


def _peak_mib(pid: int) -> float:
    """The most memory that a process has had, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _good() -> str:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _ask(port: int, body: dict[str, Any]) -> tuple[int, float]:
    """(status, seconds) of a search; status 0: no answer."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 * ANSWER_S)
    try:
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/search", json.dumps(body), kind)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return status, round(time.monotonic() - started, 2)


def _long_head(port: int, size: int) -> int:
    """Status that a request with so many bytes of headers got; 0 where it was cut off."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            line = b"X-Long: " + b"x" * 8_000 + b"\r\n"
            for _ in range(size // len(line)):
                connection.sendall(line)
            connection.sendall(b"\r\n")
            return int(connection.recv(64).split()[1])
        except (OSError, IndexError, ValueError):
            return 0


def embed_hostile(world: World) -> Tally:
    """A tar with these images among good ones: they are counted, the good ones embedded."""
    tally = Tally("images that hold an embedding")
    tar, out = world.root / "hostile.tar", world.root / "hostile"
    hostile = hostile_images()
    with tarfile.open(tar, "w") as archive:
        for number, data in enumerate([*hostile.values(), base64.b64decode(_good())]):
            suffix = "jpg" if data[:2] == b"\xff\xd8" else "tif" if data[:2] == b"II" else "png"
            add_member(archive, f"{number}.{suffix}", data)
    command = ("embed", "--model", world.model, "--shards", tar, "--out", out,
               "--patch-sizes", readers.PATCH_SIZES[0], "--num-workers", 1)  # fmt: skip
    ended = run(program, *command, timeout_s=4 * ANSWER_S)
    if ended.how != "done":
        for name in hostile:
            tally.add("lost", f"{name}: {ended.how}: {ended.said[-300:]}")
        return tally
    keys = [row[1] for rows in must(run(readers.embeddings, out)).value.values()
            if isinstance(rows, list) for row in rows]  # fmt: skip
    for number, name in enumerate(hostile):
        tally.add("harmless" if str(number) in keys else "noticed", name)
    if str(len(hostile)) not in keys:
        tally.add("lost", "the good image is missing")
    return tally
