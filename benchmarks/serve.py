"""The service under load from a second process: what HTTP adds to a query, and what sharing saves.

    python benchmarks/serve.py [--count 100000] [--rounds 300] [--seconds 10]

An index of clustered synthetic vectors of width 384, a text tower of MiniLM's size, texts that are
never asked twice. Overhead: one client, a query over HTTP and the same text's forward and bare
FAISS search in this process, in turn; medians. Throughput: 1 and 32 clients in turn, each with a
connection of its own.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from harness import Target, interleave, write_result
from retrieval.index import index_pieces
from retrieval.kinds import search_params
from retrieval.partitions import METADATA_SCHEMA
from retrieval.pieces import Rows
from retrieval.search import Searcher
from retrieval.tune import Tuning

ROOT = Path(__file__).resolve().parent.parent
PATCH = 28
K = 10
CLIENTS = 32
TURNS = 3
KINDS = ("a red", "a small", "an old", "two happy", "a broken", "a sleeping", "some yellow")
THINGS = ("cat", "dog", "house", "tree", "river", "bicycle", "mountain", "bridge", "train")
PLACES = ("in the rain", "at night", "on a table", "by the sea", "in winter", "under a roof")


def texts(seed: int) -> Iterator[str]:
    """Captions of four to nine words, the same ones for a seed."""
    draw = random.Random(seed)
    for number in itertools.count():
        parts = (draw.choice(KINDS), draw.choice(THINGS), draw.choice(PLACES), str(number))
        yield " ".join(parts)


def build(folder: Path, count: int) -> None:
    """A model with an untrained projection, and an index of synthetic vectors that fits it."""
    from search import synthetic

    from contrastive import LitModel, load_vision_tower
    from contrastive.lit import LossConfig, TextSide
    from contrastive.text import TextConfig, TextEncoder, load_text_tower

    torch.manual_seed(0)
    tower = load_vision_tower("dinov2s")
    text = TextEncoder(load_text_tower(TextConfig()), tower.embed_dim)
    model = LitModel(tower, TextSide(text, LossConfig())).eval()
    model.save_pretrained(folder / "model")
    numbers = np.arange(count)
    names = [f"picture {number}" for number in range(count)]
    columns = {"id": numbers, "offset": numbers, "size": numbers}
    columns |= {"key": names, "caption": names, "shard": ["gone.tar"] * count}
    table = pa.Table.from_pydict(columns, schema=METADATA_SCHEMA)
    described = {
        "image_fingerprint": model.image_fingerprint, "text_fingerprint": model.text_fingerprint,
        "width": tower.embed_dim, "patch_sizes": [PATCH], "images": "",
    }  # fmt: skip
    vectors = synthetic(count, 1, max(1, count // 200))
    print(
        index_pieces(folder / "index", folder / "model", described, [Rows({PATCH: vectors}, table)])
    )


class Client:
    """One connection that asks one query after another."""

    def __init__(self, port: int, seed: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._texts = texts(seed)

    def ask(self) -> None:
        body = json.dumps({"text": next(self._texts), "k": K})
        self._connection.request("POST", "/v1/search", body)
        answer = self._connection.getresponse()
        found = answer.read()
        if answer.status != 200 or len(json.loads(found)["hits"]) != K:
            raise SystemExit(f"the server answered {answer.status}: {found[:200]!r}")


async def _load(port: int, clients: int, seconds: float, seed: int) -> list[float]:
    """Seconds of each query that `clients` connections asked within the time."""
    end = time.perf_counter() + seconds
    took: list[float] = []

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for text in texts(1000 * seed + number):
            start = time.perf_counter()
            if start > end:
                break
            body = json.dumps({"text": text, "k": K}).encode()
            head = f"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            headers = await reader.readuntil(b"\r\n\r\n")
            if not headers.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {headers[:100]!r}")
            length = headers.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            took.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return took


def load(port: int, clients: int, seconds: float, seed: int) -> dict[str, float]:
    """Queries/s and latencies in ms, measured by another process."""
    command = [sys.executable, __file__, "--load", str(port), str(clients), str(seconds), str(seed)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    took = json.loads(run.stdout)
    p50, p99 = 1e3 * np.percentile(took, (50, 99))
    return {"per_s": len(took) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--rounds", type=int, default=300, help="single queries")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn of load")
    parser.add_argument("--load", nargs=4, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        port, clients, seconds, seed = args.load
        print(json.dumps(asyncio.run(_load(int(port), int(clients), seconds, int(seed)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, args.count)
        searcher = Searcher.load(folder / "index")
        command = [sys.executable, ROOT / "launch/serve.py", "--port", "0"]
        command += ["--index", folder / "index"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            port = int(next(line for line in lines if line.startswith("http")).rpartition(":")[2])
            figures, targets = measure(searcher, port, args.rounds, args.seconds)
        finally:
            server.terminate()
            server.wait(40)
    figures = {"vectors": args.count, "kind": searcher.snapshot.manifest["kind"], **figures}
    write_result("serve", figures, targets, packages=("torch", "faiss-gpu", "fastapi", "uvicorn"))


def measure(
    searcher: Searcher, port: int, rounds: int, seconds: float
) -> tuple[dict[str, object], list[Target]]:
    """Overhead and throughput of a running server."""
    (segment,) = searcher.snapshot.segments
    index = segment.inner[PATCH]
    tuning = searcher.snapshot.tunings.get((segment.number, PATCH), Tuning())
    params = search_params(index, tuning.nprobe, max(tuning.ef, K))
    client, own = Client(port, 1), texts(2)

    def bare() -> None:
        vector = searcher.model.encode_text([next(own)]).numpy()
        index.search(vector, K, params=params)

    timings = interleave({"http": client.ask, "bare": bare}, rounds, warmup=20)
    pairs = zip(timings.seconds["http"], timings.seconds["bare"], strict=True)
    overhead = [1e3 * (http - bare) for http, bare in pairs]
    runs: dict[int, list[dict[str, float]]] = {1: [], CLIENTS: []}
    for turn in range(TURNS):
        for clients, found in runs.items():
            found.append(load(port, clients, seconds, 10 * turn + clients))
    rates = {n: float(np.median([run["per_s"] for run in found])) for n, found in runs.items()}
    p50 = 1e3 * (timings.median("http") - timings.median("bare"))
    figures = {
        "single": timings.figures(),
        "overhead_ms": {"p50": p50, "quartiles": np.percentile(overhead, (25, 75)).tolist()},
        "load": {f"{n} clients": found for n, found in runs.items()},
    }
    targets = [
        Target("ms that the service adds to a text query, p50", "<= 3", p50),
        Target("queries/s of 32 clients over one", ">= 4", rates[CLIENTS] / rates[1]),
    ]
    return figures, targets


if __name__ == "__main__":
    main()
