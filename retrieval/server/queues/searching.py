"""Searches of concurrent requests, together where they may be, and without near-duplicates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from retrieval.search.config import MAX_K
from retrieval.search.searcher import Hit, Searcher
from retrieval.server.monitoring import Metrics
from retrieval.server.queues.batching import Batcher

DUPLICATE = 0.94  # cosine from which on two hits count as one, as in clip-retrieval
MAX_SEARCHES = 64  # of one pass over the index
MAX_REFINED = 8  # searches whose candidates are encoded again together


@dataclass(frozen=True)
class SearchKey:
    """Searches of equal keys can share a pass over the index."""

    index: str
    patch_size: int
    k: int
    where: str = ""  # JSON
    deduplicate: bool = False
    nprobe: int | None = None
    ef: int | None = None
    refine_patch_size: int | None = None
    candidates: int = 0


class SearchQueue:
    """A queue of plain searches, and one of those that are refined, which take longer."""

    def __init__(
        self, searchers: Mapping[str, Searcher], metrics: Metrics, batcher: Callable[..., Batcher]
    ) -> None:
        """batcher: makes a `Batcher` of this server."""
        self._searchers, self._metrics = dict(searchers), metrics
        sizes = metrics.batch_size
        self._plain = batcher(
            self._search, max_batch=MAX_SEARCHES, observe=sizes.labels("search").observe
        )
        self._refined = batcher(
            self._search, max_batch=MAX_REFINED, observe=sizes.labels("refine").observe
        )

    def close(self) -> None:
        self._plain.close()
        self._refined.close()

    async def search(
        self,
        key: SearchKey,
        vector: Float[np.ndarray, " d"],
        fine: Float[np.ndarray, " d"] | None = None,
    ) -> list[Hit]:
        """Hits, best first, of one unit-norm vector. fine: the query as the refinement sees it."""
        queue = self._plain if key.refine_patch_size is None else self._refined
        return (await queue.submit(key, [(vector, vector if fine is None else fine)]))[0]

    def _search(self, key: SearchKey, items: list[Any]) -> list[list[Hit]]:
        searcher = self._searchers[key.index]
        vectors, fine = (np.stack(part) for part in zip(*items, strict=True))
        step = "knn_index_time" if key.refine_patch_size is None else "refine_time"
        with self._metrics.timed(step):
            if not key.deduplicate:
                return _nearest(searcher, key, vectors, fine, key.k)
            most = key.candidates or MAX_K
            depth = min(2 * key.k + 20, most)
            while True:  # deeper, until k are left
                found = _nearest(searcher, key, vectors, fine, depth)
                kept = _without_duplicates(searcher, found, key.patch_size)
                rows = zip(found, kept, strict=True)
                if depth == most or all(len(a) < depth or len(b) >= key.k for a, b in rows):
                    return [row[: key.k] for row in kept]
                depth = min(2 * depth, most)


def _nearest(
    searcher: Searcher, key: SearchKey, vectors: Any, fine: Any, k: int
) -> list[list[Hit]]:
    return searcher.search_embeds(
        vectors, k, key.patch_size,
        refine_patch_size=key.refine_patch_size, refine_embeds=fine,
        candidates=key.candidates, where=json.loads(key.where) if key.where else None,
        nprobe=key.nprobe, ef=key.ef,
    )  # fmt: skip


def _without_duplicates(
    searcher: Searcher, found: list[list[Hit]], patch_size: int
) -> list[list[Hit]]:
    """Without the hits that resemble better ones, and those deleted since they were found."""
    snapshot = searcher.snapshot
    ids = [hit.id for row in found for hit in row]
    try:
        vectors = snapshot.vectors(ids, patch_size)
    except KeyError:  # a later snapshot than was searched
        there = set(snapshot.ids().tolist())
        found = [[hit for hit in row if hit.id in there] for row in found]
        vectors = snapshot.vectors([hit.id for row in found for hit in row], patch_size)
    kept, start = [], 0
    for row in found:
        own = vectors[start : start + len(row)]
        kept.append([row[n] for n in distinct(own)])
        start += len(row)
    return kept


def distinct(
    vectors: Float[np.ndarray, "n d"], threshold: float = DUPLICATE
) -> Int[np.ndarray, " m"]:
    """Rows that resemble none before them, in order. Later rows never change the choice among
    earlier ones, so that pages fit together."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-12)
    alike = np.tril(unit @ unit.T >= threshold, -1)
    return np.flatnonzero(~alike.any(axis=1))
