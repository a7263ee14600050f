"""How far a search in an approximate index must look: measured once, on the index itself."""

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retrieval.index.create import ivf_of
from retrieval.index.faiss_setup import faiss
from retrieval.index.filters import pack
from retrieval.index.manifest import Tuning
from retrieval.index.nearest import nearest_exactly, search_params

K = 10
RECALL = 0.985  # of the ten nearest, on average, that nprobe or ef must find
FILTERED_RECALL = 0.95
QUERIES = 128
TIMED = 24
TIMED_SCANS = 5  # which take long, and all the same
SELECTIVITIES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


class Sample(NamedTuple):
    """Some vectors of an index, and what was found out while it was filled."""

    vectors: Float[np.ndarray, "n d"]
    nearest: Int[np.ndarray, "q k"] | None = None  # rows nearest to `draw_queries(vectors)`


def draw_queries(sample: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "q d"]:
    """Queries like those to come: vectors of the index, each moved half its length towards another,
    since a text lies beside the images that it describes and not among them."""
    draw = np.random.default_rng(0)
    rows = draw.integers(0, len(sample), (2, QUERIES))
    queries = sample[rows[0]] + 0.5 * sample[rows[1]]
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    return (queries / np.maximum(norms, 1e-12)).astype(np.float32)


def tune(index: faiss.Index, sample: Sample, latency_ms: float) -> Tuning:
    """The smallest nprobe or ef that finds 98.5% of the ten nearest; the largest that answers
    within latency_ms where that is too slow. index: what lies inside its `IndexIDMap`."""
    ivf = ivf_of(index)
    if ivf is None and not isinstance(index, faiss.IndexHNSW):
        return Tuning()
    queries, nearest = draw_queries(sample.vectors), sample.nearest
    if nearest is None:
        nearest = nearest_exactly(index, queries, K)[1]
    most = ivf.nlist if ivf is not None else 2048
    value = 1 if ivf is not None else 16
    best = None
    while True:
        tuning = _measure(index, queries, nearest, value)
        if best is None or tuning.query_ms <= latency_ms:
            best = tuning
        if tuning.recall >= RECALL or tuning.query_ms > latency_ms or value >= most:
            break
        value = min(2 * value, most)
    return replace(best, exact_below=_exact_below(index, queries[:TIMED], best))


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
    """The largest of SELECTIVITIES at which scanning a filter's matches is better."""
    draw = np.random.default_rng(1)
    for share in SELECTIVITIES:
        packed = pack(draw.random(index.ntotal) < share)
        params = search_params(index, tuning.nprobe, tuning.ef, packed)
        alone = np.split(queries, len(queries))
        start = time.perf_counter()
        for one in alone[:TIMED_SCANS]:
            nearest_exactly(index, one, K, packed)
        middle = time.perf_counter()
        found = np.concatenate([index.search(one, K, params=params)[1] for one in alone])
        search_s = (time.perf_counter() - middle) / len(alone)
        if search_s >= (middle - start) / TIMED_SCANS:
            return share
        nearest = nearest_exactly(index, queries, K, packed)[1]  # at once, which is faster
        if overlap(found, nearest) < FILTERED_RECALL:
            return share
    return 0.0


def overlap(found: Int[np.ndarray, "q k"], nearest: Int[np.ndarray, "q k"]) -> float:
    """Share of the nearest that were found; missing places (-1) do not count."""
    pairs = [(set(a), {n for n in b if n >= 0}) for a, b in zip(found, nearest, strict=True)]
    wanted = sum(len(b) for _, b in pairs)
    return sum(len(a & b) for a, b in pairs) / max(1, wanted)
