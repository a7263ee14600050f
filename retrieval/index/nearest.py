"""The nearest vectors of one FAISS index: FAISS's own search, or its matrix product over blocks.

FAISS multiplies matrices over plain float32 vectors alone: with a filter, or float16 vectors, it
reads every vector once per query. From a few queries on it is faster to copy the vectors that may
be found into float32 blocks, and to let FAISS multiply those. ms of one core (EPYC, Zen 3) for
100,000 vectors of width 384, by FAISS's own search and by blocks:

    queries                        1          4          8         32         128
    float32, half may be found    9   26    40   28    90   36   419   50   1424   92
    float16, all                  8   50    26   48    54   56   201   75    892  171
    float16, a tenth              3    7    10    7    21   15    91   10    393   24

Searches pass their parameters along; nothing here changes an index.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from retrieval.index.config import K_FACTOR
from retrieval.index.faiss_setup import faiss

MIN_QUERIES = {"float32": 4, "float16": 8}  # from which on blocks are faster
BLOCK = 8192  # vectors: 12 MB as float32 of width 384

Found = tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]
"""(similarities, numbers), best first; number -1 where fewer than k were found."""
Packed = UInt8[np.ndarray, " bytes"] | None
"""A filter: a bit per vector, little end first; only the set ones can be found. None: all."""


def nearest(
    index: faiss.Index,
    queries: Float[np.ndarray, "q d"],
    k: int,
    nprobe: int,
    ef: int,
    packed: Packed = None,
    k_factor: int = K_FACTOR,
) -> Found:
    """The k largest inner products. index: what lies inside an `IndexIDMap`. nprobe, ef, k_factor:
    see `retrieval.index.manifest.Tuning`."""
    vectors = stored_vectors(index)
    plain = packed is None and isinstance(index, faiss.IndexFlat)  # FAISS multiplies by itself
    if vectors is not None and not plain and len(queries) >= MIN_QUERIES[vectors.dtype.name]:
        return nearest_by_blocks(vectors, queries, k, packed)
    return index.search(queries, k, params=search_params(index, nprobe, ef, packed, k_factor))


def nearest_exactly(
    index: faiss.Index, queries: Float[np.ndarray, "q d"], k: int, packed: Packed = None
) -> Found:
    """`nearest` by a scan of every vector: the stored ones, or all inverted lists."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    elif isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    nprobe = index.nlist if isinstance(index, faiss.IndexIVF) else 1
    return nearest(index, queries, k, nprobe, 1, packed)


def search_params(
    index: faiss.Index, nprobe: int, ef: int, packed: Packed = None, k_factor: int = K_FACTOR
) -> Any | None:
    """FAISS's parameters of one call."""
    types: Any = faiss  # whose stubs know no keywords
    selector = {} if packed is None else {"sel": types.IDSelectorBitmap(packed)}
    if isinstance(index, faiss.IndexRefine):
        base = search_params(faiss.downcast_index(index.base_index), nprobe, ef, packed)
        # The refinement takes no selector: it re-ranks what the base let through.
        return types.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        if packed is None:
            return _lists_params(min(nprobe, index.nlist))
        return types.SearchParametersIVF(nprobe=min(nprobe, index.nlist), **selector)
    if isinstance(index, faiss.IndexHNSW):
        return types.SearchParametersHNSW(efSearch=ef, **selector)
    return faiss.SearchParameters(**selector) if selector else None


@lru_cache(maxsize=64)
def _lists_params(nprobe: int) -> Any:
    """Parameters that hold no filter; FAISS reads them only."""
    types: Any = faiss
    return types.SearchParametersIVF(nprobe=nprobe)


def stored_vectors(index: faiss.Index) -> Float[np.ndarray, "n d"] | None:
    """What a flat (float32) or flat16 (float16) index holds, not copied; None for other types."""
    float16 = faiss.ScalarQuantizer.QT_fp16
    if isinstance(index, faiss.IndexFlat):
        dtype = "f4"
    elif isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == float16:
        dtype = "f2"
    else:
        return None
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return codes.view(dtype).reshape(index.ntotal, index.d)


def nearest_by_blocks(
    vectors: Float[np.ndarray, "n d"],
    queries: Float[np.ndarray, "q d"],
    k: int,
    packed: Packed = None,
) -> Found:
    """`nearest` by matrix products over blocks of the vectors that `packed` lets through."""
    chosen = None
    if packed is not None:
        chosen = np.flatnonzero(np.unpackbits(packed, count=len(vectors), bitorder="little"))
    count = len(vectors) if chosen is None else len(chosen)
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, count, BLOCK):
        rows = slice(start, start + BLOCK) if chosen is None else chosen[start : start + BLOCK]
        block = torch.from_numpy(vectors[rows]).float().numpy()
        similarities, numbers = faiss.knn(
            queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        numbers += start
        best.add_result(similarities, numbers if chosen is None else chosen[numbers])
    best.finalize()
    return best.D, best.I
