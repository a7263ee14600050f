"""Hits without near-duplicates of better ones."""

import numpy as np
from jaxtyping import Float, Int

from retrieval.detail import Detail
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher

DUPLICATE = 0.94  # two hits of at least this cosine count as one, as in clip-retrieval


def without_duplicates(
    searcher: Searcher, found: list[list[Hit]], patch_size: Detail
) -> list[list[Hit]]:
    """Without the hits that resemble better ones, and those deleted since they were found."""
    ids = dict.fromkeys(hit.id for row in found for hit in row)
    vectors = searcher.snapshot.known_vectors([*ids], patch_size)
    kept = []
    for row in found:
        there = [hit for hit in row if hit.id in vectors]
        if there:
            there = [there[n] for n in distinct(np.stack([vectors[hit.id] for hit in there]))]
        kept.append(there)
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
