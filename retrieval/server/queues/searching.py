"""Searches of concurrent requests, batched where their keys agree; leaves out near-duplicates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float

from retrieval.detail import Detail
from retrieval.search.config import MAX_K
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher
from retrieval.server.duplicates import Found, without_duplicates
from retrieval.server.monitoring import Metrics
from retrieval.server.queues.batching import Batcher
from retrieval.words.asked import WordQuery

MAX_SEARCHES = 64  # of one pass over the index
MAX_REFINED = 8  # searches whose candidates are encoded again together


@dataclass(frozen=True)
class SearchKey:
    """Searches of equal keys can share a pass over the index."""

    index: str
    patch_size: Detail
    k: int
    where: str = ""  # JSON
    deduplicate: bool = False
    nprobe: int | None = None
    ef: int | None = None
    refine_patch_size: Detail | None = None
    candidates: int = 0
    words: float = 0.0
    regions: bool = False


class SearchQueue:
    """A queue of plain searches, and one of those that are refined, which take longer. Indexes that
    this machine searches share them; each other one has its own, so that none waits for it."""

    def __init__(
        self, searchers: Mapping[str, Searcher], metrics: Metrics, batcher: Callable[..., Batcher]
    ) -> None:
        """batcher: makes a `Batcher` of this server."""
        self._searchers, self._metrics = dict(searchers), metrics
        sizes = metrics.batch_size

        @cache
        def queues(remote: str) -> tuple[Batcher, Batcher]:
            return (
                batcher(
                    self._search, max_batch=MAX_SEARCHES, observe=sizes.labels("search").observe
                ),
                batcher(
                    self._search, max_batch=MAX_REFINED, observe=sizes.labels("refine").observe
                ),
            )

        self._queues = {
            name: queues(name if searcher.place.is_remote else "")
            for name, searcher in searchers.items()
        }

    def close(self) -> None:
        for queue in {queue for queues in self._queues.values() for queue in queues}:
            queue.close()

    async def search(
        self,
        key: SearchKey,
        vector: Float[np.ndarray, " d"],
        fine: Float[np.ndarray, " d"] | None = None,
        texts: WordQuery = (),
    ) -> Found:
        """Hits, best first, of one unit-norm vector. fine: the query as the refinement sees it.
        texts: those whose words are looked for."""
        plain, refined = self._queues[key.index]
        queue = plain if key.refine_patch_size is None else refined
        return (await queue.submit(key, [(vector, vector if fine is None else fine, texts)]))[0]

    def _search(self, key: SearchKey, items: list[Any]) -> list[Found]:
        searcher = self._searchers[key.index]
        *embeds, texts = zip(*items, strict=True)
        vectors, fine = map(np.stack, embeds)
        step = "knn_index_time" if key.refine_patch_size is None else "refine_time"
        with self._metrics.timed(step):
            if not key.deduplicate:
                found = _nearest(searcher, key, vectors, fine, texts, key.k)
                return [Found(row, range(len(row) + 1)) for row in found]
            most = key.candidates or MAX_K
            depth = min(2 * key.k + 20, most)
            while True:  # search deeper until k remain
                found = _nearest(searcher, key, vectors, fine, texts, depth)
                kept = without_duplicates(searcher, found, key.patch_size)
                rows = zip(found, kept, strict=True)
                if depth == most or all(len(a) < depth or len(b.hits) >= key.k for a, b in rows):
                    return [row.best(key.k) for row in kept]
                depth = min(2 * depth, most)


def _nearest(
    searcher: Searcher, key: SearchKey, vectors: Any, fine: Any, texts: Any, k: int
) -> list[list[Hit]]:
    return searcher.search_embeds(
        vectors, k, key.patch_size,
        refine_patch_size=key.refine_patch_size, refine_embeds=fine,
        candidates=key.candidates, where=json.loads(key.where) if key.where else None,
        nprobe=key.nprobe, ef=key.ef, words=key.words, texts=texts,
        regions=key.regions,
    )  # fmt: skip
