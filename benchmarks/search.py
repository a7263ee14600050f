"""Every index type: recall, speed, memory and build time.

    python benchmarks/search.py [--counts 100000 1000000] [--rounds 200]

Vectors of width 384: clustered synthetic ones, and the default drawings with their captions as
queries; runs the demo first where that has not been done. Recall@10 is against an exact scan.
Single queries run in turn, one of each type per round, on one thread; queries/s are for batches of
64 on all cores. Memory, mapped files included, is what a fresh process holds more than before:
after 256 queries, and at most while it builds. `auto` may take 10 ms. A graph of more than 200,000
vectors takes many minutes to build on two cores and is left out unless --index-types names hnsw.
About 12 minutes on two cores, after `make demo`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from lib.harness import Target, finish, interleave
from lib.vectors import WIDTH, synthetic
from retrieval.embed.manifest import read_manifest
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.config import INDEX_TYPES, IndexTypeChoice
from retrieval.index.row_sources import EmbeddedPartition, RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import overlap

ROOT = Path(__file__).resolve().parent.parent
PATCH = 28
K = 10
QUERIES = 1000
BATCH = 64
LATENCY_MS = 10.0
MAX_GRAPH = 200_000  # vectors, unless a graph is asked for
PER_CLUSTER = 200  # vectors around one centre


def write_vectors(folder: Path, count: int) -> None:
    """`vectors.npy` and `queries.npy`."""
    folder.mkdir()
    clusters = max(1, count // PER_CLUSTER)
    np.save(folder / "vectors.npy", synthetic(count, 1, clusters))
    np.save(folder / "queries.npy", synthetic(QUERIES, 2, clusters))


def write_default_data(folder: Path) -> None:
    """The demo's drawings, and its captions as queries."""
    from contrastive import LitModel

    index, embeddings = ROOT / "runs" / "index", ROOT / "runs" / "embeddings"
    if not index.is_dir():
        subprocess.run([sys.executable, str(ROOT / "launch" / "demo.py")], check=True, cwd=ROOT)
    folder.mkdir()
    source = read_manifest(embeddings)
    shards = [
        EmbeddedPartition(embeddings, number, partition["count"])
        for number, partition in enumerate(source["partitions"])
    ]
    np.save(folder / "vectors.npy", np.concatenate([s.vectors(PATCH, 0, s.count) for s in shards]))
    captions = [c for s in shards for c in s.metadata(0, s.count)["caption"].to_pylist()]
    texts = list(dict.fromkeys(c for c in captions if c))[:QUERIES]
    model = LitModel.from_pretrained(index / "model")
    blocks = [model.encode_text(texts[i : i + 256]).numpy() for i in range(0, len(texts), 256)]
    np.save(folder / "queries.npy", np.concatenate(blocks))


# ---- one index type, in a process of its own -------------------------------------------------


def build_one(folder: Path, index_type: IndexTypeChoice) -> None:
    """Build an index of `vectors.npy`; prints build time, peak memory and what auto said."""
    from retrieval.index.build import index_rows, new_manifest

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    count = len(vectors)
    empty = [""] * count
    numbers = np.arange(count)
    columns: dict[str, Any] = {"id": numbers, "offset": numbers, "size": numbers}
    columns |= {"key": numbers.astype(str), "caption": empty, "shard": empty}
    rows = RowsInMemory({PATCH: vectors}, pa.Table.from_pydict(columns, schema=METADATA_SCHEMA))
    manifest = new_manifest("", "", WIDTH, [PATCH], "", index_type, latency_ms=LATENCY_MS)
    (folder / "no model").mkdir(exist_ok=True)
    before = _resident_mib()
    start = time.perf_counter()
    reason = index_rows(folder / index_type, folder / "no model", manifest, [rows])
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts what the parent held, too
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    (entry,) = json.loads((folder / index_type / "manifest.json").read_text())["segments"]
    print(
        json.dumps(
            {
                "reason": reason,
                "index_type": entry["kind"],
                "build_s": round(seconds, 1),
                "build_peak_mib": round(peak - before),
                "file_mib": round(entry["bytes"][f"patch_{PATCH}"] / 2**20, 1),
                "tuning": entry["tuning"][str(PATCH)],
            }
        )
    )


def hold_one(folder: Path, index_type: str) -> None:
    """Search a built index 256 times; prints the memory that it took."""
    queries = np.load(folder / "queries.npy")
    before = _resident_mib()
    snapshot = Snapshot.open(folder / index_type)
    for row in range(256):
        snapshot.nearest(queries[row % len(queries)][None], K, PATCH)
    print(json.dumps({"resident_mib": round(_resident_mib() - before, 1)}))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _in_own_process(step: str, folder: Path, index_type: str) -> dict:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    command += ["--index-type", index_type]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


# ---- all index types, side by side -----------------------------------------------------------


def measure(folder: Path, types: list[str], rounds: int) -> dict[str, dict]:
    """The table of one set of vectors."""
    figures: dict[str, dict] = {}
    for type_ in types:
        figures[type_] = _in_own_process("build", folder, type_)
        figures[type_] |= _in_own_process("hold", folder, type_)
        print(folder.name, type_, figures[type_], flush=True)
    queries = np.load(folder / "queries.npy")
    snapshots = {type_: Snapshot.open(folder / type_) for type_ in types}
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    exact = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    turn = dict.fromkeys(types, 0)

    def one(type_: str) -> None:
        row = turn[type_] = (turn[type_] + 1) % len(queries)
        snapshots[type_].nearest(queries[row : row + 1], K, PATCH)

    def many(type_: str) -> None:
        snapshots[type_].nearest(queries[:BATCH], K, PATCH)

    single = interleave({k: partial(one, k) for k in types}, rounds, warmup=10)
    batch = interleave({k: partial(many, k) for k in types}, max(5, rounds // 20), warmup=1)
    for type_ in types:
        found = snapshots[type_].nearest(queries, K, PATCH)[1]
        ms = 1e3 * np.array(single.seconds[type_])
        figures[type_] |= {
            "recall_at_10": round(overlap(found, exact), 4),
            "query_p50_ms": round(float(np.median(ms)), 3),
            "query_p99_ms": round(float(np.percentile(ms, 99)), 3),
            "rounds": rounds,
            "queries_per_s": round(min(BATCH, len(queries)) / batch.median(type_), 1),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--index-types", nargs="+", help="auto among them; all but long builds")
    parser.add_argument("--rounds", type=int, default=200, help="single queries per type")
    parser.add_argument("--no-default-data", action="store_true", help="synthetic vectors alone")
    parser.add_argument("--folder", help="where vectors and indexes lie (10 GB); a temporary one")
    parser.add_argument("--step", choices=["build", "hold"], help=argparse.SUPPRESS)
    parser.add_argument("--index-type", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"build": build_one, "hold": hold_one}[args.step](Path(args.folder), args.index_type)
        return

    def types(count: int) -> list[str]:
        affordable = [type_ for type_ in INDEX_TYPES if type_ != "hnsw" or count <= MAX_GRAPH]
        return args.index_types or [*affordable, "auto"]

    figures, targets = {}, []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for count in args.counts:
            folder = Path(temporary) / f"{count}"
            write_vectors(folder, count)
            figures[f"{count:,} synthetic"] = measure(folder, types(count), args.rounds)
        if not args.no_default_data:
            folder = Path(temporary) / "default"
            write_default_data(folder)
            figures["default data"] = measure(folder, types(0), args.rounds)
    largest = max(args.counts)
    auto = figures[f"{largest:,} synthetic"]["auto"]
    targets.append(Target(f"auto at {largest:,}: recall@10", ">= 0.97", auto["recall_at_10"]))
    what = f"auto at {largest:,}: one query, p50 ms"
    targets.append(Target(what, f"<= {LATENCY_MS:g}", auto["query_p50_ms"]))
    finish("search", figures, targets, packages=("faiss-gpu", "numpy", "pyarrow"))


if __name__ == "__main__":
    main()
