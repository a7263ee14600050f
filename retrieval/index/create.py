"""A FAISS index of each type, made and filled, and the type of one that was read.

Every index is an inner product over unit-norm vectors, numbered 0, 1, ... inside an `IndexIDMap`.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.errors import UsageError
from retrieval.index.choose import HNSW_LINKS, MIN_VECTORS, num_lists, pq_bytes
from retrieval.index.config import INDEX_TYPES, IndexType
from retrieval.index.exact import nearest_of
from retrieval.index.faiss_setup import faiss
from retrieval.index.gpus import copy_to_gpus, gpu_lock

QUERY_BITS = 4  # that rabitq rounds a query's numbers to
HNSW_BUILD = 80  # efConstruction; 20,000 vectors of width 384 take 3 s on two cores


def new_index(
    index_type: IndexType,
    width: int,
    count: int,
    sample: Float[np.ndarray, "n d"],
    gpus: int = 0,
    linked_later: bool = False,
) -> faiss.IndexIDMap:
    """An empty index of `index_type`, trained on `sample` for `count` vectors.

    gpus: how many of them FAISS uses for the k-means. linked_later: an hnsw links what is added on
    its upper levels only, a thirtieth of the work (`link_by_gpu` does the rest). Deterministic for
    one number of threads, and one kind of GPU.
    """
    inner_product = faiss.METRIC_INNER_PRODUCT
    index: Any
    ivf: Any
    if index_type == "flat":
        index = faiss.IndexFlatIP(width)
    elif index_type == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, inner_product)
        index.hnsw.efConstruction = HNSW_BUILD
        index.init_level0 = not linked_later
    elif index_type == "flat16":
        index = _float16(width)
    else:
        centroids = faiss.IndexFlatIP(width)
        nlist = num_lists(count)
        if index_type == "ivf":
            index = ivf = faiss.IndexIVFFlat(centroids, width, nlist, inner_product)
        elif index_type == "rabitq":
            ivf = faiss.IndexIVFRaBitQ(centroids, width, nlist, inner_product)
            ivf.qb = QUERY_BITS
            index = faiss.IndexRefine(ivf, _float16(width))
        else:
            ivf = faiss.IndexIVFPQ(centroids, width, nlist, pq_bytes(width), 8, inner_product)
            ivf.pq.cp.min_points_per_centroid = 1  # a small index trains as well as it can
            index = faiss.IndexRefine(ivf, _float16(width))
        ivf.cp.spherical = True
        ivf.cp.min_points_per_centroid = 1
        sample = np.ascontiguousarray(sample, np.float32)
        if gpus:
            _train_on_gpus(index, ivf, sample, gpus)
        else:
            index.train(sample)
    return faiss.IndexIDMap(index)


def _train_on_gpus(index: Any, ivf: Any, sample: Float[np.ndarray, "n d"], gpus: int) -> None:
    """Train with k-means on GPUs, while no other thread searches there."""
    with gpu_lock:
        copies = {(ivf, "clustering_index"): copy_to_gpus(faiss.IndexFlatIP(ivf.d), gpus)}
        if isinstance(ivf, faiss.IndexIVFPQ):
            codes = faiss.IndexFlatL2(ivf.pq.dsub)
            copies[ivf.pq, "assign_index"] = copy_to_gpus(codes, 1)
        try:
            for (owner, name), copy in copies.items():
                setattr(owner, name, copy)
            index.train(sample)
        finally:
            while copies:
                (owner, name), copy = copies.popitem()
                setattr(owner, name, None)
                copy.thisown = True  # given away as it was assigned, and nobody would free it
                del copy


def _float16(width: int) -> faiss.IndexScalarQuantizer:
    quantizer = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(width, quantizer, faiss.METRIC_INNER_PRODUCT)


def add(
    whole: faiss.IndexIDMap,
    vectors: Float[np.ndarray, "n d"],
    ids: Int[np.ndarray, " n"],
    on_device: Float[Tensor, "n d"] | None = None,
) -> None:
    """Add vectors to an index of `new_index`.

    on_device: the same vectors, where a device is to find the list of each: a million of width 512
    in a tenth of a second. The lists themselves are filled on the CPU, so that the file is the same
    but for vectors that lie between two lists to within rounding.
    """
    index: Any = faiss.downcast_index(whole.index)
    ivf = ivf_of(index)
    if on_device is None or ivf is None:
        whole.add_with_ids(vectors, ids)
        return
    quantizer = faiss.downcast_index(ivf.quantizer)
    centroids = torch.from_numpy(quantizer.reconstruct_n(0, ivf.nlist)).to(on_device.device)
    lists = nearest_of(centroids, on_device).cpu().numpy()
    count, done = len(vectors), whole.ntotal
    numbers = np.arange(done, done + count)
    pointers = map(faiss.swig_ptr, (vectors, numbers, lists))
    ivf.add_core(count, *pointers)
    if index is not ivf:  # with float16 vectors beside
        index.refine_index.add(vectors)
        index.ntotal = index.refine_index.ntotal
    whole.id_map.resize(done + count)
    faiss.rev_swig_ptr(whole.id_map.data(), done + count)[done:] = ids
    whole.ntotal = done + count


def num_training(index_type: IndexType, count: int) -> int:
    """Vectors wanted to train an index of `index_type` for `count` vectors."""
    if index_type not in MIN_VECTORS:
        return 0
    return min(count, max(64 * num_lists(count), 40_000))


def type_of(index: faiss.Index) -> IndexType:
    """The type of what lies inside an `IndexIDMap`. Raises `UsageError` for any other."""
    lists = ivf_of(index)
    for class_, index_type in (
        (faiss.IndexFlat, "flat"),
        (faiss.IndexScalarQuantizer, "flat16"),
        (faiss.IndexIVFFlat, "ivf"),
        (faiss.IndexIVFPQ, "ivfpq"),
        (faiss.IndexIVFRaBitQ, "rabitq"),
        (faiss.IndexHNSW, "hnsw"),
    ):
        if isinstance(index if lists is None else lists, class_):
            return index_type  # type: ignore[return-value]
    raise UsageError(f"{type(index).__name__} is no index type; allowed: {', '.join(INDEX_TYPES)}")


def ivf_of(index: faiss.Index) -> Any | None:
    """The part of an index that has inverted lists, None where there is none."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return index if isinstance(index, faiss.IndexIVF) else None
