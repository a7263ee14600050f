"""How far a search in an approximate index must look: measured once, on the index itself.

It is measured by the queries that will come. Texts lie apart from images, and lists or codes that
hold what an image is near to may miss what a text is near to; so captions of the index's own images
are encoded where there are some, and the model to encode them.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.index.create import ivf_of
from retrieval.index.faiss_setup import faiss
from retrieval.index.filters import pack
from retrieval.index.manifest import Tuning
from retrieval.index.nearest import nearest_exactly, search_params
from retrieval.index.row_sources import RowSource, blocks

K = 10
RECALL = 0.985  # of the ten nearest, on average, that are to be found
FILTERED_RECALL = 0.95
NUM_CAPTIONS = 512  # whose recall is known to within 0.003
MIN_CAPTIONS = 64  # fewer say too little
CAPTION_BLOCKS = 32  # of rows, that they are drawn from
NUM_MOVED = 128
MAX_EF = 2048
MAX_K_FACTOR = 160
TIMED = 24
TIMED_SCANS = 5  # which take long, and all the same
SELECTIVITIES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


# ---- queries -------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What an index is tuned by."""

    queries: Float[np.ndarray, "q d"]  # unit norm
    nearest: Int[np.ndarray, "q k"]  # rows
    captions: bool = False  # whether the queries are texts


def caption_queries(
    sources: Sequence[RowSource], model: Path | LitModel, device: str, width: int
) -> Float[np.ndarray, "q d"] | None:
    """Up to NUM_CAPTIONS captions of the rows, encoded; None where they have fewer than
    MIN_CAPTIONS, or there is no model of that width."""
    captions = draw_captions(sources)
    if len(captions) < MIN_CAPTIONS:
        return None
    try:
        if not isinstance(model, LitModel):
            model = LitModel.from_pretrained(model, device=device)
        embeds = model.encode_text(captions).float().cpu().numpy()
    except UsageError:
        return None
    return embeds if embeds.shape[1] == width else None


def draw_captions(sources: Sequence[RowSource]) -> list[str]:
    """Up to NUM_CAPTIONS different ones from all over the rows, the same ones every time."""
    draw = np.random.default_rng(0)
    parts = list(blocks(sources, 0, sum(source.count for source in sources)))
    chosen = np.sort(draw.permutation(len(parts))[:CAPTION_BLOCKS])
    found: list[str] = []
    for source, start, stop in (parts[number] for number in chosen):
        captions = source.metadata(start, stop)["caption"]
        captions = pc.unique(captions.filter(pc.not_equal(pc.utf8_trim_whitespace(captions), "")))
        rows = draw.permutation(len(captions))[: 2 * NUM_CAPTIONS // len(chosen) + 1]
        found += captions.take(rows).to_pylist()
    different = list(dict.fromkeys(found))
    return [different[row] for row in draw.permutation(len(different))[:NUM_CAPTIONS]]


def moved_vectors(sample: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "q d"]:
    """In place of captions: vectors of the index, each moved half its length towards another,
    since a text lies beside the images that it describes and not among them."""
    draw = np.random.default_rng(0)
    rows = draw.integers(0, len(sample), (2, NUM_MOVED))
    queries = sample[rows[0]] + 0.5 * sample[rows[1]]
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    return (queries / np.maximum(norms, 1e-12)).astype(np.float32)


# ---- tuning --------------------------------------------------------------------------------


def tune(index: faiss.Index, trial: Trial, latency_ms: float) -> Tuning:
    """How far to look to find 98.5% of the ten nearest; as far as latency_ms allows where that is
    too slow. index: what lies inside its `IndexIDMap`, of an approximate type.

    What there is to double (lists looked into and vectors re-ranked, or the walk's candidates) is
    doubled one after another: each time what finds more.
    """
    most = _largest(index)
    here = _measure(index, trial, Tuning(captions=len(trial.queries) if trial.captions else 0))
    while here.recall < RECALL:
        further = [
            _measure(index, trial, replace(here, **{name: min(2 * getattr(here, name), limit)}))
            for name, limit in most.items()
            if getattr(here, name) < limit
        ]
        further = [tuning for tuning in further if tuning.query_ms <= latency_ms]
        if not further:
            break
        here = max(further, key=lambda tuning: tuning.recall)
    return replace(here, exact_below=_exact_below(index, trial.queries[:TIMED], here))


def _largest(index: faiss.Index) -> dict[str, int]:
    """What of a `Tuning` changes how far an index looks, and the most that helps."""
    if isinstance(index, faiss.IndexHNSW):
        return {"ef": MAX_EF}
    ivf = ivf_of(index)
    assert ivf is not None, "no other type is approximate"
    return {"nprobe": ivf.nlist} | (
        {"k_factor": MAX_K_FACTOR} if isinstance(index, faiss.IndexRefine) else {}
    )


def _measure(index: faiss.Index, trial: Trial, tuning: Tuning) -> Tuning:
    """The same, with its recall and time."""
    params = search_params(index, tuning.nprobe, tuning.ef, k_factor=tuning.k_factor)
    found = index.search(trial.queries, K, params=params)[1]
    seconds = []
    for row in range(TIMED):
        start = time.perf_counter()
        index.search(trial.queries[row : row + 1], K, params=params)
        seconds.append(time.perf_counter() - start)
    query_ms = 1e3 * float(np.median(seconds))
    return replace(tuning, recall=overlap(found, trial.nearest), query_ms=query_ms)


def _exact_below(index: faiss.Index, queries: Float[np.ndarray, "q d"], tuning: Tuning) -> float:
    """The largest of SELECTIVITIES at which scanning a filter's matches is better."""
    draw = np.random.default_rng(1)
    for share in SELECTIVITIES:
        packed = pack(draw.random(index.ntotal) < share)
        params = search_params(index, tuning.nprobe, tuning.ef, packed, tuning.k_factor)
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
