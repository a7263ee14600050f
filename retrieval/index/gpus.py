"""Copies of an index on GPUs, and how several GPUs share its vectors."""

from typing import Any, Literal

import torch

from data.errors import UsageError
from retrieval.index.config import GPU_INDEX_TYPES, Device, IndexType
from retrieval.index.faiss_setup import faiss
from retrieval.index.row_sources import BLOCK_ROWS


def num_gpus(device: Device) -> int:
    """GPUs that FAISS works on, 0 for the CPU. Raises `UsageError` for GPUs that are missing."""
    found = faiss.get_num_gpus()
    if device not in ("auto", "cpu") and not found:
        raise UsageError(f"device {device}: FAISS sees no GPU here; allowed: auto, cpu")
    return 0 if device == "cpu" else 1 if device == "cuda" else found


def gpu_memory() -> int:
    """Free bytes of the GPU that has fewest."""
    return min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


def to_gpus(index: Any, index_type: IndexType, device: Device, bytes_held: int) -> Any | None:
    """A copy of `index` on the GPUs, None where it stays on the CPU.

    bytes_held: that its vectors take. Of ivfpq the codes go to the GPUs, the
    float16 vectors for re-ranking stay memory-mapped. Raises `UsageError` when a GPU is asked for
    and the index type cannot go there.
    """
    gpus = num_gpus(device)
    if not gpus:
        return None
    if index_type not in GPU_INDEX_TYPES:
        if device == "auto":
            return None
        raise UsageError(
            f"device {device}: FAISS has no {index_type} on GPUs; allowed: auto, cpu, or an "
            f"index of type {', '.join(GPU_INDEX_TYPES)}"
        )
    if index_type == "ivfpq":
        base = faiss.downcast_index(index.base_index)
        copy = to_gpus(base, "ivf", device, bytes_held)
        return faiss.IndexRefine(copy, faiss.downcast_index(index.refine_index))
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = index_type == "flat16"
    options.shard = (
        gpus > 1 and spread(index_type, device, 2 * bytes_held <= gpu_memory()) == "shards"
    )
    if gpus > 1 and index_type == "flat16":
        index = as_flat(index)
    return faiss.index_cpu_to_all_gpus(index, co=options, ngpu=gpus)


def spread(
    index_type: IndexType, device: Device, fits_twice: bool
) -> Literal["shards", "replicas"]:
    """How several GPUs share the vectors: replicas where they fit twice over and FAISS supports
    them, which it does not for searches with parameters (nprobe). Raises `UsageError` for such
    replicas."""
    takes_parameters = index_type not in ("flat", "flat16")
    if device == "replicas" and takes_parameters:
        raise UsageError(
            "device replicas: FAISS's replicas take no nprobe, which inverted lists need; allowed: "
            "auto, cpu, cuda, shards, or an index of type flat, flat16"
        )
    if device == "auto":
        return "replicas" if fits_twice and not takes_parameters else "shards"
    return "replicas" if device == "replicas" else "shards"


def as_flat(index: Any) -> faiss.IndexFlatIP:
    """The vectors of a flat16 index as float32: what FAISS copies to several GPUs as float16."""
    flat = faiss.IndexFlatIP(index.d)
    for start in range(0, index.ntotal, BLOCK_ROWS):
        flat.add(index.reconstruct_n(start, min(BLOCK_ROWS, index.ntotal - start)))
    return flat
