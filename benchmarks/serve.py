"""The service under load from a second process: what HTTP adds to a query, and what batching saves.

    python benchmarks/serve.py [--count 100000] [--rounds 300] [--seconds 10]

An index of clustered synthetic vectors of width 384, a text tower of MiniLM's size, no text twice.
Overhead: one client sends a text over HTTP, then this process encodes a text and searches FAISS
itself, in turn; medians. Throughput: 1 and 32 clients in turn, each with its own connection.

Against clip-retrieval's own server (lib/clip_retrieval_server.py, in an environment of its own):
the same FAISS index, /knn-service with the body that its `ClipClient` sends for a vector, the two
servers in turn. Once over the index type that `auto` takes and once over a graph, clip-retrieval's
usual choice, whose fast search hides less of what a server adds. About 10 minutes on two cores.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib import clip_retrieval_server
from lib.harness import Target, finish, interleave
from lib.synthetic_index import PATCH, build, serving, texts
from lib.vectors import synthetic
from retrieval.index.manifest import read_index_manifest
from retrieval.index.nearest import search_params
from retrieval.index.snapshot import Snapshot
from retrieval.search.searcher import Searcher

K = 10
CLIENTS = 32
TURNS = 3
VECTORS = 100  # of one client, again and again; neither server remembers answers
CLUSTERS = 500
ACCEPTED = {
    f"{where}: queries/s over clip-retrieval's": why
    for where, why in {
        "flat16, 1 client": "most of a lone query is the same scan of all vectors in both servers",
        "flat16, 32 clients": "both servers wait for the scan of all vectors, which hides the rest",
    }.items()
}


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


# ---- load, from another process --------------------------------------------------------------

What = Literal["text", "vector"]
"""text: /v1/search. vector: clip-retrieval's /knn-service."""


def bodies(what: What, seed: int) -> Iterator[tuple[str, bytes]]:
    """(path, body) of one query after another, without end."""
    if what == "text":
        return (("/v1/search", json.dumps({"text": t, "k": K}).encode()) for t in texts(seed))
    asked = {  # by ClipClient, its defaults included
        "text": None, "image": None, "image_url": None, "deduplicate": True,
        "use_safety_model": True, "use_violence_detector": True, "indice_name": None,
        "use_mclip": False, "aesthetic_score": 9, "aesthetic_weight": 0.5, "modality": "image",
        "num_images": 40, "num_result_ids": 40,
    }  # fmt: skip
    made = [
        json.dumps({**asked, "embedding_input": vector.tolist()}).encode()
        for vector in synthetic(VECTORS, 2 + seed, CLUSTERS)
    ]
    return (("/knn-service", body) for body in itertools.cycle(made))


class Connection:
    """Kept open for as long as the server keeps it, as `requests.Session` would."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: bytes) -> bytes:
        """The body of the answer, which must be one of status 200."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = headers.partition(b"content-length:")[2].partition(b"\r\n")[0]
        answer = await reader.readexactly(int(length))
        if headers.split()[1] != b"200":
            raise SystemExit(f"the server answered {headers[:100]!r} {answer[:200]!r}")
        if b"connection: close" in headers:
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _load(port: int, clients: int, seconds: float, seed: int, what: What) -> list[float]:
    """Seconds of each query that `clients` connections asked within the time."""
    asked = [bodies(what, 1000 * seed + number) for number in range(clients)]
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def one(queries: Iterator[tuple[str, bytes]]) -> None:
        connection = Connection(port)
        while (start := time.perf_counter()) < end:
            await connection.ask(*next(queries))
            took.append(time.perf_counter() - start)
        connection.close()

    await asyncio.gather(*map(one, asked))
    return took


def load(
    port: int, clients: int, seconds: float, seed: int, what: What = "text"
) -> dict[str, float]:
    """Queries/s and latencies in ms, measured by another process."""
    numbers = [str(port), str(clients), str(seconds), str(seed)]
    command = [sys.executable, __file__, "--load", *numbers, what]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    took = json.loads(run.stdout)
    p50, p99 = 1e3 * np.percentile(took, (50, 99))
    return {"per_s": len(took) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


Runs = dict[int, list[dict[str, float]]]
"""Per number of clients, what each turn of load found."""


def median(runs: Runs, clients: int, figure: str) -> float:
    return float(np.median([run[figure] for run in runs[clients]]))


# ---- what is measured ------------------------------------------------------------------------


def measure_texts(
    searcher: Searcher, port: int, rounds: int, seconds: float
) -> tuple[dict[str, Any], list[Target]]:
    """Overhead and throughput of a running server."""
    (segment,) = Snapshot.open(searcher.folder).segments
    index, tuning = segment.indexes[PATCH], segment.tuning(PATCH)
    params = search_params(index, tuning.nprobe, max(tuning.ef, K), k_factor=tuning.k_factor)
    client, own = Client(port, 1), texts(2)

    def bare() -> None:
        vector = searcher.model.encode_text([next(own)]).numpy()
        index.search(vector, K, params=params)

    timings = interleave({"http": client.ask, "bare": bare}, rounds, warmup=20)
    pairs = zip(timings.seconds["http"], timings.seconds["bare"], strict=True)
    overhead = [1e3 * (http - bare) for http, bare in pairs]
    runs: Runs = {1: [], CLIENTS: []}
    for turn in range(TURNS):
        for clients, found in runs.items():
            found.append(load(port, clients, seconds, 10 * turn + clients))
    p50 = 1e3 * (timings.median("http") - timings.median("bare"))
    figures = {
        "single": timings.figures(),
        "overhead_ms": {"p50": p50, "quartiles": np.percentile(overhead, (25, 75)).tolist()},
        "load": {f"{n} clients": found for n, found in runs.items()},
    }
    rate = median(runs, CLIENTS, "per_s") / median(runs, 1, "per_s")
    targets = [
        Target("ms that the service adds to a text query, p50", "<= 3", p50),
        Target("queries/s of 32 clients over one", ">= 4", rate),
    ]
    return figures, targets


def measure_vectors(index: Path, seconds: float) -> tuple[dict[str, Any], list[Target]]:
    """Our server and clip-retrieval's over one FAISS index, in turn."""
    index_type = read_index_manifest(index).index_type
    theirs = index.with_name(f"{index.name}_theirs")
    clip_retrieval_server.export(index, PATCH, theirs)
    runs: dict[str, Runs] = {"ours": {1: [], CLIENTS: []}, "clip-retrieval": {1: [], CLIENTS: []}}
    with serving(index) as (our_port, _), clip_retrieval_server.running(theirs) as their_port:
        ports = {"ours": our_port, "clip-retrieval": their_port}
        _same_answers(*ports.values())
        for turn in range(TURNS):
            for clients in (1, CLIENTS):
                for name, port in ports.items():
                    found = load(port, clients, seconds, 10 * turn + clients, "vector")
                    runs[name][clients].append(found)
    targets = []
    for clients in (1, CLIENTS):
        per_s, p99 = (
            [median(runs[name], clients, figure) for name in runs] for figure in ("per_s", "p99_ms")
        )
        where = f"{index_type}, {clients} client{'s' * (clients > 1)}"
        targets += [
            Target(f"{where}: queries/s over clip-retrieval's", ">= 3", per_s[0] / per_s[1]),
            Target(f"{where}: p99 over clip-retrieval's", "<= 1", p99[0] / p99[1]),
        ]
    return {name: {f"{n} clients": f for n, f in r.items()} for name, r in runs.items()}, targets


def _same_answers(*ports: int) -> None:
    """Raises SystemExit where the servers find other images."""

    async def ask(port: int) -> list[list[int]]:
        connection, queries = Connection(port), bodies("vector", 0)
        answers = [json.loads(await connection.ask(*next(queries))) for _ in range(20)]
        connection.close()
        return [[hit["id"] for hit in answer] for answer in answers]

    ours, theirs = (np.array(asyncio.run(ask(port))) for port in ports)
    same = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ours, theirs, strict=True)])
    if same < 0.99:
        raise SystemExit(f"the two servers agree on {same:.0%} of the images only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--rounds", type=int, default=300, help="single queries")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn of load")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        port, clients, seconds, seed, what = args.load
        took = asyncio.run(_load(int(port), int(clients), float(seconds), int(seed), what))
        print(json.dumps(took))
        return
    clip_retrieval_server.install()
    figures: dict[str, Any] = {"vectors": args.count}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, args.count, ("auto", "hnsw"))
        with serving(folder / "index") as (port, _):
            searcher = Searcher.load(folder / "index")
            figures["index_type"] = searcher.snapshot.manifest.index_type
            texts_, targets = measure_texts(searcher, port, args.rounds, args.seconds)
        figures |= texts_
        for name in ("index", "index_hnsw"):
            index_type = read_index_manifest(folder / name).index_type
            figures[f"vectors, {index_type}"], more = measure_vectors(folder / name, args.seconds)
            targets += more
    packages = ("torch", "faiss-gpu", "fastapi", "uvicorn")
    finish("serve", figures, targets, packages=packages, accepted=ACCEPTED)


if __name__ == "__main__":
    main()
