"""An index in Milvus beside one in a folder: recall, latency, filters, deletions, a restart.

    python benchmarks/milvus.py [--count 100000] [--rounds 50] [--uri http://localhost:19530]

Clustered synthetic vectors of width 384 with the usual columns. Without --uri, Milvus Lite of
.venv-interop/milvus (`make interop`) runs as a server in a process of its own, on the same machine.
Recall@10 is against an exact scan, over the vectors that a filter lets through. Single queries run
in turn, one of each contender per round; those of Milvus bring their metadata along.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lib.harness import finish, interleave
from lib.vectors import WIDTH, rows_of, synthetic
from retrieval import delete_ids
from retrieval.index.build import index_rows, new_manifest
from retrieval.index.config import IndexType
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import overlap
from retrieval.milvus.address import MilvusAddress
from retrieval.milvus.place import MilvusPlace
from retrieval.milvus.write import delete_in_milvus, rows_to_milvus

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from milvus_lite_server import LiteServer  # noqa: E402

PATCH, K, QUERIES = 28, 10, 100
TYPES = ("flat", "hnsw")
DELETED = 1000


def rows(count: int) -> RowsInMemory:
    """Vectors whose `size` counts them, and whose captions repeat every hundred."""
    numbers = range(count)
    return rows_of(
        synthetic(count, 1, max(1, count // 200)),
        PATCH,
        key=[f"{number:08d}" for number in numbers],
        caption=[f"a drawing of thing number {number % 100}" for number in numbers],
        shard=[f"drawings/{number // 10_000:04d}.tar" for number in numbers],
    )


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 2)


def build(folder: Path, uri: str, count: int, types: Sequence[IndexType]) -> dict[str, Any]:
    """All indexes. Seconds each took."""
    (folder / "no model").mkdir(exist_ok=True)
    sources, took = [rows(count)], {}
    for type_ in types:
        manifest = new_manifest("", "", WIDTH, [PATCH], "", type_, device="cpu")
        into = partial(index_rows, folder / type_, folder / "no model", manifest, sources, "cpu")
        took[f"folder, {type_}"] = seconds_of(into)
        push = partial(rows_to_milvus, MilvusAddress(uri, type_), "", manifest, sources)
        took[f"Milvus, {type_}"] = seconds_of(push)
        print(took, flush=True)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--index-types", nargs="+", default=TYPES, choices=[*TYPES, "ivf"])
    parser.add_argument("--rounds", type=int, default=50, help="single queries per contender")
    parser.add_argument("--uri", help="a Milvus that runs; not given: Milvus Lite is started")
    parser.add_argument("--folder", help="where indexes lie; a temporary folder")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    lite = None if args.uri else LiteServer(folder / "lite")
    try:
        uri = args.uri if lite is None else f"http://127.0.0.1:{lite.port}"
        finish("milvus", measure(folder, uri, lite, args), [], packages=("faiss-gpu", "pymilvus"))
    finally:
        if lite is not None:
            lite.stop()
        if not args.folder:
            shutil.rmtree(folder)


def measure(
    folder: Path, uri: str, lite: LiteServer | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The table."""
    count, types = args.count, args.index_types
    vectors, queries = (
        synthetic(count, 1, max(1, count // 200)),
        synthetic(QUERIES, 2, count // 200),
    )
    filters: dict[str, tuple[Any, np.ndarray]] = {
        "no filter": (None, np.ones(count, bool)),
        "half": ({"size": {"<": count // 2}}, np.arange(count) < count // 2),
        "1%, words": ({"caption": {"contains": "NUMBER 77"}}, np.arange(count) % 100 == 77),
    }
    figures: dict[str, Any] = {"count": count, "built_s": build(folder, uri, count, types)}
    places = {type_: MilvusPlace(MilvusAddress(uri, type_)) for type_ in types}
    states: dict[str, Any] = {}
    for type_ in types:
        states[f"folder, {type_}"] = Snapshot.open(folder / type_)
        states[f"Milvus, {type_}"] = places[type_].open("cpu")
    for name, (where, mask) in filters.items():
        some = np.flatnonzero(mask)
        exact = some[np.argsort(-(queries @ vectors[some].T), axis=1)[:, :K]]
        turn = dict.fromkeys(states, 0)

        def one(who: str, where: Any = where, turn: dict[str, int] = turn) -> None:
            row = turn[who] = (turn[who] + 1) % QUERIES
            states[who].nearest(queries[row : row + 1], K, PATCH, where)

        timings = interleave({who: partial(one, who) for who in states}, args.rounds, warmup=3)
        for who, state in states.items():
            found = np.concatenate(
                [state.nearest(queries[n : n + 1], K, PATCH, where)[1] for n in range(QUERIES)]
            )
            low, high = timings.quartiles(who)
            figures.setdefault(name, {})[who] = {
                "recall_at_10": round(overlap(found, exact), 4),
                "p50_ms": round(1e3 * timings.median(who), 2),
                "quartiles_ms": [round(1e3 * low, 2), round(1e3 * high, 2)],
            }
        print(name, figures[name], flush=True)
    figures["deletions"] = {}
    gone = list(range(0, 10 * DELETED, 10))
    for type_ in types:
        address = MilvusAddress(uri, type_)
        figures["deletions"] |= {
            f"folder, {type_}: s": seconds_of(partial(delete_ids, folder / type_, gone)),
            f"Milvus, {type_}: s": seconds_of(partial(delete_in_milvus, address, gone)),
        }
        found = places[type_].open("cpu").nearest(vectors[gone[:50]], K, PATCH)[1]
        assert not np.isin(found, gone).any(), "a deleted image was found"
    if lite is not None:
        lite.stop()
        figures["restart"] = {"server answers, s": seconds_of(lite.start)}
        for type_ in types:
            place = MilvusPlace(MilvusAddress(uri, type_))

            def first(place: MilvusPlace = place) -> None:
                state = place.open("cpu")
                assert len(state) == count - DELETED
                assert not np.isin(state.nearest(vectors[gone[:1]], K, PATCH)[1], gone).any()

            figures["restart"][f"{type_}: first search, s"] = seconds_of(first)
    return figures


if __name__ == "__main__":
    main()
