"""How far a search in an approximate index must look: measured once, on the index itself."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Bool, Float, Int

from retrieval.index.create import cells_of, exact_search, search_params

K = 10
RECALL = 0.985  # of the ten nearest, on average, that nprobe or ef must find
FILTERED_RECALL = 0.95
QUERIES = 128
TIMED = 24
SELECTIVITIES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


@dataclass(frozen=True)
class Tuning:
    """What a search of one index passes along unless it is told otherwise."""

    nprobe: int = 1  # cells looked into: ivf, ivfpq
    ef: int = 16  # candidates kept on the walk: hnsw
    exact_below: float = 0.0  # share of vectors that a filter lets through: fewer are scanned
    recall: float = 1.0  # at ten, measured
    query_ms: float = 0.0  # median of one query alone, measured; 0 where nothing was

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def draw_queries(sample: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "q d"]:
    """Queries like those to come: vectors of the index, each pushed half its length towards
    another, since a text lies beside the images that it describes and not among them."""
    draw = np.random.default_rng(0)
    rows = draw.integers(0, len(sample), (2, QUERIES))
    queries = sample[rows[0]] + 0.5 * sample[rows[1]]
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    return (queries / np.maximum(norms, 1e-12)).astype(np.float32)


def tune(index: faiss.Index, sample: Float[np.ndarray, "n d"], latency_ms: float) -> Tuning:
    """The smallest nprobe or ef that finds 98.5% of the ten nearest; the largest that answers
    within latency_ms where that is too slow. index: what lies inside its `IndexIDMap`."""
    cells = cells_of(index)
    if cells is None and not isinstance(index, faiss.IndexHNSW):
        return Tuning()
    queries = draw_queries(sample)
    nearest = exact_search(index, queries, K)[1]
    most = cells.nlist if cells is not None else 2048
    value = 1 if cells is not None else 16
    best = None
    while True:
        tuning = _measure(index, queries, nearest, value)
        if best is None or tuning.query_ms <= latency_ms:
            best = tuning
        if tuning.recall >= RECALL or tuning.query_ms > latency_ms or value >= most:
            break
        value = min(2 * value, most)
    return Tuning(**{**best.to_json(), "exact_below": _exact_below(index, queries[:TIMED], best)})


def _measure(
    index: faiss.Index,
    queries: Float[np.ndarray, "q d"],
    nearest: Int[np.ndarray, "q k"],
    value: int,
) -> Tuning:
    params = search_params(index, value, value)
    found = index.search(queries, K, params=params)[1]
    seconds = []
    for row in range(TIMED):
        start = time.perf_counter()
        index.search(queries[row : row + 1], K, params=params)
        seconds.append(time.perf_counter() - start)
    query_ms = 1e3 * float(np.median(seconds))
    return Tuning(value, value, 0.0, overlap(found, nearest), query_ms)


def _exact_below(index: faiss.Index, queries: Float[np.ndarray, "q d"], tuning: Tuning) -> float:
    """The largest of SELECTIVITIES at which a scan of what a filter lets through is better."""
    draw = np.random.default_rng(1)
    for share in SELECTIVITIES:
        packed = pack(draw.random(index.ntotal) < share)
        start = time.perf_counter()
        nearest = exact_search(index, queries, K, packed)[1]
        middle = time.perf_counter()
        params = search_params(index, tuning.nprobe, tuning.ef, packed)
        found = index.search(queries, K, params=params)[1]
        slower = time.perf_counter() - middle >= middle - start
        if slower or overlap(found, nearest) < FILTERED_RECALL:
            return share
    return 0.0


def overlap(found: Int[np.ndarray, "q k"], nearest: Int[np.ndarray, "q k"]) -> float:
    """Share of the nearest that were found; missing places (-1) do not count."""
    pairs = [(set(a), {n for n in b if n >= 0}) for a, b in zip(found, nearest, strict=True)]
    wanted = sum(len(b) for _, b in pairs)
    return sum(len(a & b) for a, b in pairs) / max(1, wanted)


def pack(mask: Bool[np.ndarray, " n"]) -> np.ndarray:
    """A bit per vector, little end first, as FAISS reads bitmaps."""
    return np.packbits(mask, bitorder="little")
