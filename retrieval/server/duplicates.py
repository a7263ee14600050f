"""Hits without near-duplicates of better ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retrieval.detail import Detail
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher

DUPLICATE = 0.94  # two hits of at least this cosine count as one, as in clip-retrieval


class Found(NamedTuple):
    """Hits of a query, best first, and how many near-duplicates of better ones lie between them."""

    hits: list[Hit]
    places: Sequence[int]
    """Of each hit, and of the end, among all that were looked at; ascending, from 0."""

    def best(self, count: int) -> "Found":
        return Found(self.hits[:count], self.places[: count + 1])

    def num_left_out(self, count: int) -> int:
        """Near-duplicates that are better than the hit after the first `count`; all without one."""
        count = min(count, len(self.hits))
        return self.places[count] - count


def without_duplicates(
    searcher: Searcher, found: list[list[Hit]], patch_size: Detail
) -> list[Found]:
    """Without the hits that resemble better ones, and those deleted since they were found."""
    ids = dict.fromkeys(hit.id for row in found for hit in row)
    vectors = searcher.snapshot.known_vectors([*ids], patch_size)
    kept = []
    for row in found:
        there = [hit for hit in row if hit.id in vectors]
        chosen: list[int] = []
        if there:
            chosen = distinct(np.stack([vectors[hit.id] for hit in there])).tolist()
        kept.append(Found([there[n] for n in chosen], [*chosen, len(there)]))
    return kept


def distinct(
    vectors: Float[np.ndarray, "n d"], threshold: float = DUPLICATE
) -> Int[np.ndarray, " m"]:
    """Rows that resemble none before them, in order. Later rows never change the choice among
    earlier ones, so pages are consistent."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-12)
    alike = np.tril(unit @ unit.T >= threshold, -1)
    return np.flatnonzero(~alike.any(axis=1))
