"""An empty FAISS index of each type, and the type of one that was read.

Every index is an inner product over unit-norm vectors, numbered 0, 1, ... inside an `IndexIDMap`.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from data.errors import UsageError
from retrieval.index.choose import HNSW_LINKS, num_lists, pq_bytes
from retrieval.index.config import INDEX_TYPES, IndexType
from retrieval.index.faiss_setup import faiss

HNSW_BUILD = 80  # efConstruction; 20,000 vectors of width 384 take 3 s on two cores


def new_index(
    index_type: IndexType, width: int, count: int, sample: Float[np.ndarray, "n d"], gpus: int = 0
) -> faiss.IndexIDMap:
    """An empty index of `index_type`, trained on `sample` for `count` vectors.

    gpus: how many of them share the k-means. Deterministic for one number of threads.
    """
    inner_product = faiss.METRIC_INNER_PRODUCT
    index: Any
    ivf: Any
    if index_type == "flat":
        index = faiss.IndexFlatIP(width)
    elif index_type == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, inner_product)
        index.hnsw.efConstruction = HNSW_BUILD
    elif index_type == "flat16":
        index = _float16(width)
    else:
        centroids = faiss.IndexFlatIP(width)
        nlist = num_lists(count)
        if index_type == "ivf":
            index = ivf = faiss.IndexIVFFlat(centroids, width, nlist, inner_product)
        else:
            ivf = faiss.IndexIVFPQ(centroids, width, nlist, pq_bytes(width), 8, inner_product)
            ivf.pq.cp.min_points_per_centroid = 1  # a small index trains as well as it can
            index = faiss.IndexRefine(ivf, _float16(width))
        ivf.cp.spherical = True
        ivf.cp.min_points_per_centroid = 1
        if gpus:
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(width), ngpu=gpus)
        index.train(np.ascontiguousarray(sample, np.float32))
        if gpus:
            ivf.clustering_index = None
    return faiss.IndexIDMap(index)


def _float16(width: int) -> faiss.IndexScalarQuantizer:
    quantizer = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(width, quantizer, faiss.METRIC_INNER_PRODUCT)


def num_training(index_type: IndexType, count: int) -> int:
    """Vectors wanted to train an index of `index_type` for `count` vectors."""
    if index_type not in ("ivf", "ivfpq"):
        return 0
    return min(count, max(64 * num_lists(count), 40_000))


def type_of(index: faiss.Index) -> IndexType:
    """The type of what lies inside an `IndexIDMap`. Raises `UsageError` for any other."""
    for class_, index_type in (
        (faiss.IndexFlat, "flat"),
        (faiss.IndexScalarQuantizer, "flat16"),
        (faiss.IndexIVFFlat, "ivf"),
        (faiss.IndexRefine, "ivfpq"),
        (faiss.IndexHNSW, "hnsw"),
    ):
        if isinstance(index, class_):
            return index_type  # type: ignore[return-value]
    raise UsageError(f"{type(index).__name__} is no index type; allowed: {', '.join(INDEX_TYPES)}")


def ivf_of(index: faiss.Index) -> Any | None:
    """The part of an index that has inverted lists, None where there is none."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return index if isinstance(index, faiss.IndexIVF) else None
