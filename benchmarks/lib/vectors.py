"""Vectors in the place of embeddings: clustered random ones, and mixtures of real ones."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.row_sources import RowsInMemory

WIDTH = 384
BLOCK_ROWS = 65_536  # vectors drawn at a time
SPREAD = 1.0  # length of a vector's own part, its centre's being 1: cosine 0.5 between neighbours


def synthetic(count: int, seed: int, num_clusters: int, width: int = WIDTH) -> np.ndarray:
    """Unit vectors around `num_clusters` random centres, the same ones for every seed."""
    centres = np.random.default_rng(0).standard_normal((num_clusters, width), np.float32)
    draw = np.random.default_rng(seed)
    out = np.empty((count, width), np.float32)
    for start in range(0, count, BLOCK_ROWS):
        part = out[start : start + BLOCK_ROWS]
        own = draw.standard_normal(part.shape, np.float32)
        part[:] = centres[draw.integers(0, num_clusters, len(part))] + SPREAD * own
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


NOISE = 0.3  # length of a mixture's noise, that of its parts being 1


def mixtures(real: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors between two rows of `real` each, nearer to the first, with noise; and the number
    of that first row."""
    draw = np.random.default_rng(seed)
    out = np.empty((count, real.shape[1]), np.float32)
    first = draw.integers(0, len(real), count)
    for start in range(0, count, BLOCK_ROWS):
        part, rows = out[start : start + BLOCK_ROWS], first[start : start + BLOCK_ROWS]
        share = draw.uniform(0, 0.5, (len(part), 1)).astype(np.float32)
        part[:] = (1 - share) * real[rows] + share * real[draw.integers(0, len(real), len(part))]
        part += NOISE / real.shape[1] ** 0.5 * draw.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out, first


def rows_of(
    vectors: np.ndarray, patch_size: int, first: int = 0, **columns: Sequence[object]
) -> RowsInMemory:
    """Vectors to be indexed, with the usual metadata: numbers from `first` on and empty texts where
    no column is given."""
    numbers = first + np.arange(len(vectors))
    usual = {"id": numbers, "offset": numbers, "size": numbers, "key": numbers.astype(str)}
    texts = dict.fromkeys(("caption", "shard"), [""] * len(vectors))
    table = pa.Table.from_pydict({**usual, **texts, **columns}, schema=METADATA_SCHEMA)
    return RowsInMemory({patch_size: vectors}, table)
