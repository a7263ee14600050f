"""The server under good and malformed requests at once, while its index changes.

    python benchmarks/serve_hostile.py [--requests 100000]

Nine requests in ten are good and their answers are checked; one in ten is malformed: wrong types,
broken and huge images, vectors that are not numbers or of another width, unknown indexes, JSON
thousands of levels deep, cut connections. Meanwhile images are added and deleted, and the index is
compacted. Targets: no status of 500 or more, no wrong answer, and memory that does not grow after
the first tenth.
About 10 minutes on two cores.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lib.harness import Target, finish
from lib.synthetic_index import PATCH, build, serving, texts
from lib.vectors import rows_of, synthetic
from retrieval.index.build import change_index, compact_index
from retrieval.index.row_sources import RowsInMemory
from retrieval.search.searcher import Searcher

COUNT = 20_000  # images that stay
ADDED = 200  # images of one addition
CLIENTS = 16
TEXTS = 40
STAYING = {"offset": {"<": COUNT}}  # what is added lies above


@dataclass
class Seen:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    cut: int = 0
    changes: int = 0
    resident_mib: list[float] = field(default_factory=list)


class Client:
    """One connection, opened again where it was cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes, kind: str = "") -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{kind}\r\n"
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = headers.partition(b"content-length:")[2].partition(b"\r\n")[0]
            content = await reader.readexactly(int(length or 0))
        except (OSError, asyncio.IncompleteReadError):
            await self.close()
            return 0, b""
        if b"connection: close" in headers:
            await self.close()
        return int(headers.split()[1]), content

    async def cut(self, part: bytes) -> None:
        """Send something, and hang up."""
        await self.close()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(part)
        await writer.drain()
        writer.close()

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Visitor:
    """Asks good and bad questions, and knows the answers to the good ones."""

    def __init__(self, searcher: Searcher, seed: int) -> None:
        self._draw = random.Random(seed)
        self._vectors = staying_vectors()
        asked = texts(0)
        self._texts = [next(asked) for _ in range(TEXTS)]
        found = searcher.search(self._texts, k=5, where=STAYING)
        self._expected = {t: [h.id for h in row] for t, row in zip(self._texts, found, strict=True)}
        self._image = _png(np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8))
        self._bad = _malformed(self._draw, self._image)

    async def ask(self, client: Client, seen: Seen) -> None:
        if self._draw.random() < 0.1:
            await self._ask_badly(client, seen)
            return
        path, body, right = self._question()
        status, content = await client.ask("POST", path, json.dumps(body).encode())
        seen.statuses[status] += 1
        if status == 429:  # told to come back
            await asyncio.sleep(0.05)
        elif status != 200 or not right(json.loads(content)):
            seen.wrong.append(f"{path} {str(body)[:60]} {status} {content[:120]!r}")

    def _question(self) -> tuple[str, dict[str, Any], Callable[[Any], bool]]:
        what = self._draw.random()
        row = self._draw.randrange(COUNT)
        if what < 0.45:
            vector = self._vectors[row].tolist()
            body = {"vector": vector, "k": 3, "where": STAYING if what < 0.1 else None}
            return "/v1/search", body, lambda found: found["hits"][0]["id"] == row
        if what < 0.85:
            text = self._draw.choice(self._texts)
            wanted = self._expected[text]
            body = {"text": text, "k": 5, "where": STAYING}
            return "/v1/search", body, lambda f: _mostly([h["id"] for h in f["hits"]], wanted)
        if what < 0.93:
            body = {"ids": [row, 10**12]}
            key = f"image {row}"
            return "/metadata", body, lambda f: [one["metadata"]["key"] for one in f] == [key]
        if what < 0.97:
            vector = self._vectors[row].tolist()
            body = {"embedding_input": vector, "num_images": 2, "modality": "image"}
            return "/knn-service", body, lambda found: found[0]["id"] == row
        image = base64.b64encode(self._image).decode()
        body = {"image": image, "labels": ["a cat", "rain"], "patch_size": 56}
        return "/v1/classify", body, lambda found: len(found["labels"]) == 2

    async def _ask_badly(self, client: Client, seen: Seen) -> None:
        path, body, kind = self._draw.choice(self._bad)()
        if self._draw.random() < 0.15:
            head = f"POST {path} HTTP/1.1\r\nContent-Length: 900\r\n\r\n"
            await client.cut(head.encode() + body[:50])
            seen.cut += 1
            return
        status, content = await client.ask("POST", path, body, kind)
        seen.statuses[status] += 1
        if not 400 <= status < 500 or "error" not in json.loads(content):
            seen.wrong.append(f"{path} {body[:60]!r} {status} {content[:120]!r}")


@cache
def staying_vectors() -> np.ndarray:
    """As `build` indexes them."""
    return synthetic(COUNT, 1, max(1, COUNT // 200))


def _mostly(found: list[int], wanted: list[int]) -> bool:
    """Equal but for neighbours that a batch's rounding may swap."""
    return len(set(found) & set(wanted)) >= len(wanted) - 1


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _malformed(draw: random.Random, image: bytes) -> list[Callable[[], tuple[str, bytes, str]]]:
    """Makers of (path, body, header lines) that no server should take."""
    search, good = "/v1/search", {"text": "a cat"}
    huge = _png(np.zeros((9000, 9000), np.uint8))
    wrong: list[Any] = [
        {"text": 5}, {"text": ""}, {"text": "x" * 5000}, {}, [], 7, "text", None, {"k": 3},
        {**good, "k": -1}, {**good, "k": "many"}, {**good, "k": 10**40}, {**good, "offset": 5000},
        {**good, "index": "nowhere"}, {**good, "index": 3}, {**good, "patch_size": 13},
        {**good, "where": {"colour": 1}}, {**good, "where": {"size": {"in": [{}]}}},
        {**good, "max_ms": 0}, {**good, "where": {"any": [{"key": "a"}] * 300}},
        {"vector": [1, 2, 3]}, {"vector": [0] * 384}, {"vector": ["a"] * 384},
        {"image": "?"}, {"image": base64.b64encode(b"GIF89a").decode()},
        {"image": base64.b64encode(image[:-40]).decode()[:400]},
        {"image": base64.b64encode(huge).decode()}, {"image_url": "http://127.0.0.1/"},
        {"id": 10**15}, {"mix": [{"weight": 1}]}, {**good, "unknown": 1},
    ]  # fmt: skip
    deep = b'{"text": "a", "where": ' + b'{"not": ' * 20_000
    raw = [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, deep, b'{"vector": [NaN, Infinity]}',
           b'{"text": "\\ud800"}', b'{"k": ' + b"9" * 10_000 + b"}"]  # fmt: skip
    form = "Content-Type: multipart/form-data; boundary=x\r\n"
    forms = [b"", b"--x", b"garbage", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--"]
    makers: list[Callable[[], tuple[str, bytes, str]]] = [
        lambda: (search, json.dumps(draw.choice(wrong)).encode(), ""),
        lambda: (search, json.dumps(draw.choice(wrong)).encode(), ""),
        lambda: (search, draw.choice(raw), ""),
        lambda: (search, draw.choice(forms), form),
        lambda: (search, b"x" * (17 << 20) if draw.random() < 0.05 else b"x", ""),
        lambda: ("/v1/classify", json.dumps({"labels": draw.choice([[], [""], 3])}).encode(), ""),
        lambda: ("/knn-service", json.dumps({"text": draw.choice([5, [], {}])}).encode(), ""),
        lambda: ("/metadata", json.dumps({"ids": draw.choice(["a", [-1], [1.5]])}).encode(), ""),
        lambda: (f"/{draw.choice(['x', 'v1', 'v1/search/x'])}", b"{}", ""),
    ]
    return makers


async def storm(searcher: Searcher, port: int, pid: int, folder: Path, requests: int) -> Seen:
    """All requests, and the changes meanwhile."""
    seen, left = Seen(), requests
    done = asyncio.Event()

    async def one(number: int) -> None:
        nonlocal left
        visitor, client = Visitor(searcher, number), Client(port)
        while left > 0:
            left -= 1
            if left % max(1, requests // 50) == 0:
                seen.resident_mib.append(_resident_mib(pid))
            await visitor.ask(client, seen)
        await client.close()

    async def change() -> None:
        while not done.is_set():
            await asyncio.to_thread(_change, folder, seen.changes)
            seen.changes += 1
            await asyncio.wait([asyncio.ensure_future(done.wait())], timeout=3)

    changing = asyncio.ensure_future(change())
    await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    done.set()
    await changing
    return seen


def _change(folder: Path, turn: int) -> None:
    """Take out what was added, add others; now and then merge."""
    vectors = synthetic(ADDED, 1000 + turn, max(1, COUNT // 200))

    def rows(first: int) -> list[RowsInMemory]:
        places = range(first + COUNT, first + COUNT + ADDED)
        names = [f"added {place - COUNT}" for place in places]
        columns = {"offset": places, "key": names, "caption": names, "shard": ["gone.tar"] * ADDED}
        return [rows_of(vectors, PATCH, first, **columns)]

    next_id = json.loads((folder / "manifest.json").read_text())["next_id"]
    change_index(folder, delete=list(range(COUNT, next_id)), add=rows)
    if turn % 5 == 4:
        compact_index(folder, "cpu")


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, COUNT)
        searcher = Searcher.load(folder / "index", device="cpu")
        with serving(folder / "index", "--device", "cpu") as (port, server):
            start = time.perf_counter()
            seen = asyncio.run(storm(searcher, port, server.pid, folder / "index", args.requests))
            seconds = time.perf_counter() - start
    report(seen, args.requests, seconds, server.returncode)


def report(seen: Seen, requests: int, seconds: float, stopped: int) -> None:
    memory = seen.resident_mib
    warm = memory[len(memory) // 10 :]
    growth = 100 * (float(np.median(warm[-5:])) / float(np.median(warm[:5])) - 1)
    figures = {
        "requests": requests,
        "seconds": round(seconds, 1),
        "statuses": {str(status): n for status, n in sorted(seen.statuses.items())},
        "cut_connections": seen.cut,
        "index_changes": seen.changes,
        "resident_mib": [round(value, 1) for value in memory],
        "wrong": seen.wrong[:20],
        "exit_status": stopped,
    }
    failures = sum(n for status, n in seen.statuses.items() if status >= 500 or status == 0)
    targets = [
        Target("answers of status 500 and more, or none at all", "<= 0", failures),
        Target("wrong answers", "<= 0", len(seen.wrong)),
        Target("per cent that memory grows after the first tenth", "<= 5", growth),
    ]
    packages = ("torch", "faiss-gpu", "fastapi", "uvicorn")
    finish("serve_hostile", figures, targets, packages=packages)


if __name__ == "__main__":
    main()
