"""Where FAISS searches: the CPU over memory-mapped files, one GPU, or all of them."""

from typing import Any, Literal

import faiss
import torch

from data.errors import UsageError
from retrieval.index.create import GPU_KINDS, Kind
from retrieval.index.row_sources import BLOCK_ROWS

Device = Literal["auto", "cpu", "cuda", "shards", "replicas"]
"""cuda: one GPU. shards: all GPUs, a part of the vectors each. replicas: all GPUs, every vector on
each. auto: the GPUs where there are some, see `spread`."""


def num_gpus(device: Device) -> int:
    """GPUs that FAISS works on, 0 for the CPU. Raises `UsageError` for GPUs that are missing."""
    found = faiss.get_num_gpus()
    if device not in ("auto", "cpu") and not found:
        raise UsageError(f"device {device}: FAISS sees no GPU here; allowed: auto, cpu")
    return 0 if device == "cpu" else 1 if device == "cuda" else found


def gpu_memory() -> int:
    """Free bytes of the GPU that has fewest."""
    return min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


def to_gpus(index: Any, kind: Kind, device: Device, bytes_held: int) -> Any | None:
    """A copy of `index` on the GPUs, None where it stays on the CPU.

    kind: of `index`. bytes_held: that its vectors take. Of ivfpq the codes go to the GPUs, the
    float16 vectors that rank again stay memory-mapped. Raises `UsageError` when a GPU is asked for
    and the kind cannot go there.
    """
    gpus = num_gpus(device)
    if not gpus:
        return None
    if kind not in GPU_KINDS:
        if device == "auto":
            return None
        raise UsageError(
            f"device {device}: FAISS has no {kind} on GPUs; allowed: auto, cpu, or an index of "
            f"kind {', '.join(GPU_KINDS)}"
        )
    if kind == "ivfpq":
        base = faiss.downcast_index(index.base_index)
        copy = to_gpus(base, "ivf", device, bytes_held)
        return faiss.IndexRefine(copy, faiss.downcast_index(index.refine_index))
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = kind == "flat16"
    options.shard = gpus > 1 and spread(kind, device, 2 * bytes_held <= gpu_memory()) == "shards"
    if gpus > 1 and kind == "flat16":
        index = as_flat(index)
    return faiss.index_cpu_to_all_gpus(index, co=options, ngpu=gpus)


def spread(kind: Kind, device: Device, fits_twice: bool) -> Literal["shards", "replicas"]:
    """How several GPUs share the vectors: replicas where they fit twice over and FAISS lets them,
    which is not where a search has parameters. Raises `UsageError` for replicas of cells."""
    takes_parameters = kind not in ("flat", "flat16")
    if device == "replicas" and takes_parameters:
        raise UsageError(
            "device replicas: FAISS's replicas take no nprobe, which cells need; allowed: auto, "
            "cpu, cuda, shards, or an index of kind flat, flat16"
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
