"""Every index type: recall, speed, memory and build time.

    python benchmarks/search.py [--counts 100000 1000000] [--rounds 200]
    python benchmarks/search.py --mixtures 200000 [1000000]

Without --mixtures, vectors of width 384: clustered synthetic ones, and the default drawings with
their captions as queries; runs the demo first where that has not been done. With it, mixtures of
two of the demo's real embeddings with noise, each with the caption of the nearer one; half of the
captions tune an index, the other half are the queries, beside vectors between two mixtures. What
those would have tuned is measured by the captions too.

Recall@10 is against an exact scan. Single queries run in turn, one of each type per round, on one
thread; queries/s are for batches of 64 on all cores. Memory, mapped files included, is what a fresh
process holds more than before: after 256 queries, and at most while it builds; of lists also bytes
of codes and ids per vector. `auto` may take 10 ms. A graph of more than 200,000 vectors takes many
minutes to build on two cores and is left out unless --index-types names hnsw. About 12 minutes on
two cores, after `make demo`.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from data.files import write_text_atomically
from lib.harness import RESULTS, Target, finish, interleave
from lib.search_data import MODEL, PATCH, write_default_data, write_mixtures, write_vectors
from lib.vectors import WIDTH, rows_of
from retrieval.index.config import INDEX_TYPES, IndexTypeChoice
from retrieval.index.create import ivf_of
from retrieval.index.nearest import nearest
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import Trial, moved_vectors, overlap, tune

K = 10
BATCH = 64
LATENCY_MS = 10.0
MAX_GRAPH = 200_000  # vectors, unless a graph is asked for


# ---- one index type, in a process of its own -------------------------------------------------


def build_one(folder: Path, index_type: IndexTypeChoice) -> None:
    """Build an index of `vectors.npy`; prints build time, peak memory and what auto said."""
    from retrieval.index.build import index_rows, new_manifest

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    captions, model = {}, folder / "no model"
    model.mkdir(exist_ok=True)
    if (folder / "captions.json").is_file():
        captions, model = {"caption": json.loads((folder / "captions.json").read_text())}, MODEL
    rows = rows_of(vectors, PATCH, **captions)
    manifest = new_manifest("", "", WIDTH, [PATCH], "", index_type, latency_ms=LATENCY_MS)
    before = _resident_mib()
    start = time.perf_counter()
    reason = index_rows(folder / index_type, model, manifest, [rows])
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
        built = folder / f"{type_}.json"
        if not built.is_file():
            shutil.rmtree(folder / type_, ignore_errors=True)
            write_text_atomically(built, json.dumps(_in_own_process("build", folder, type_)))
        figures[type_] = json.loads(built.read_text())
        figures[type_] |= _in_own_process("hold", folder, type_)
        print(folder.name, type_, figures[type_], flush=True)
    queries = np.load(folder / "queries.npy")
    snapshots = {type_: Snapshot.open(folder / type_) for type_ in types}
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    exact = _exact(queries, vectors)
    turn = dict.fromkeys(types, 0)

    def one(type_: str) -> None:
        row = turn[type_] = (turn[type_] + 1) % len(queries)
        snapshots[type_].nearest(queries[row : row + 1], K, PATCH)

    def many(type_: str) -> None:
        snapshots[type_].nearest(queries[:BATCH], K, PATCH)

    single = interleave({k: partial(one, k) for k in types}, rounds, warmup=10)
    batch = interleave({k: partial(many, k) for k in types}, max(5, rounds // 20), warmup=1)
    for type_, snapshot in snapshots.items():
        found = snapshot.nearest(queries, K, PATCH)[1]
        ms = 1e3 * np.array(single.seconds[type_])
        figures[type_] |= {
            "recall_at_10": round(overlap(found, exact), 4),
            "query_p50_ms": round(float(np.median(ms)), 3),
            "query_p99_ms": round(float(np.percentile(ms, 99)), 3),
            "rounds": rounds,
            "queries_per_s": round(min(BATCH, len(queries)) / batch.median(type_), 1),
            "tuning": vars(snapshot.segments[0].tuning(PATCH)),
        }
        ivf = ivf_of(snapshot.segments[0].indexes[PATCH])
        if ivf is not None:
            figures[type_]["list_bytes_per_vector"] = ivf.code_size + 8
    if (folder / "moved.npy").is_file():
        moved = np.load(folder / "moved.npy")
        nearest_to_moved = _exact(moved, vectors)
        for type_, snapshot in snapshots.items():
            found = snapshot.nearest(moved, K, PATCH)[1]
            figures[type_]["recall_at_10_of_vectors"] = round(overlap(found, nearest_to_moved), 4)
            figures[type_] |= _tuned_by_vectors(snapshot, vectors, queries, exact)
    return figures


def _once(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the folder, where that was not done already."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if not folder.is_dir():
        write(part)
        part.rename(folder)


def _exact(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]


def _tuned_by_vectors(
    snapshot: Snapshot, vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray
) -> dict[str, dict]:
    """What an approximate index finds of the captions' nearest where it is tuned without any."""
    (segment,) = snapshot.segments
    if PATCH not in segment.entry.tuning:
        return {}
    rows = np.random.default_rng(0).permutation(len(vectors))[:2048]
    moved = moved_vectors(vectors[np.sort(rows)])
    tuning = tune(segment.indexes[PATCH], Trial(moved, _exact(moved, vectors)), LATENCY_MS)
    looks = tuning.nprobe, max(tuning.ef, K), None, tuning.k_factor
    found = nearest(segment.indexes[PATCH], queries, K, *looks)[1]
    recall = round(overlap(found, exact), 4)
    return {"tuned_by_vectors": {**vars(tuning), "recall_at_10": recall}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--mixtures", type=int, nargs="+", help="so many, and nothing else")
    parser.add_argument("--index-types", nargs="+", help="auto among them; all but long builds")
    parser.add_argument("--rounds", type=int, default=200, help="single queries per type")
    parser.add_argument("--no-default-data", action="store_true", help="synthetic vectors alone")
    parser.add_argument("--folder", help="of vectors and indexes (10 GB), kept to go on from")
    parser.add_argument("--step", choices=["build", "hold"], help=argparse.SUPPRESS)
    parser.add_argument("--index-type", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"build": build_one, "hold": hold_one}[args.step](Path(args.folder), args.index_type)
        return

    def types(count: int) -> list[str]:
        affordable = [type_ for type_ in INDEX_TYPES if type_ != "hnsw" or count <= MAX_GRAPH]
        return args.index_types or [*affordable, "auto"]

    figures: dict[str, dict] = {}
    known = RESULTS / "search_captions.json"
    if args.mixtures and known.is_file():  # of other counts they stay
        figures = json.loads(known.read_text())["figures"]
    with ExitStack() as stack:
        keep = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        write = write_mixtures if args.mixtures else write_vectors
        for count in args.mixtures or args.counts:
            name = f"{count:,} {'mixtures' if args.mixtures else 'synthetic'}"
            folder = Path(keep) / name.replace(",", "").replace(" ", "-")
            _once(folder, partial(write, count=count))
            figures[name] = measure(folder, types(count), args.rounds)
            if not args.folder:
                shutil.rmtree(folder)
        if not args.no_default_data and not args.mixtures:
            folder = Path(keep) / "default"
            _once(folder, write_default_data)
            figures["default data"] = measure(folder, types(0), args.rounds)
    packages = ("faiss-gpu", "numpy", "pyarrow")
    if args.mixtures:
        finish("search_captions", figures, _by_captions(figures), packages=packages)
    else:
        finish("search", figures, _of_auto(figures, max(args.counts)), packages=packages)


def _of_auto(figures: dict[str, dict], largest: int) -> list[Target]:
    auto = figures[f"{largest:,} synthetic"]["auto"]
    what = f"auto at {largest:,}"
    return [
        Target(f"{what}: recall@10", ">= 0.97", auto["recall_at_10"]),
        Target(f"{what}: one query, p50 ms", f"<= {LATENCY_MS:g}", auto["query_p50_ms"]),
    ]


def _by_captions(figures: dict[str, dict]) -> list[Target]:
    """Of the types of at most 72 bytes a vector."""
    targets = []
    for name, table in figures.items():
        for type_, found in table.items():
            if found.get("list_bytes_per_vector", 1000) <= 72:
                what = f"{name}, {type_}"
                ratio = found["query_p50_ms"] / table["ivf"]["query_p50_ms"]
                recall = found["recall_at_10"]
                targets.append(Target(f"{what}: recall@10 of captions", ">= 0.98", recall))
                targets.append(Target(f"{what}: p50 over ivf's", "<= 1.5", ratio))
    return targets


if __name__ == "__main__":
    main()
