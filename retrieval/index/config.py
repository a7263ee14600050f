"""What an index can be and where it can be searched: choices and defaults, without FAISS."""

from typing import Literal, get_args

from data.errors import UsageError

IndexType = Literal["flat", "flat16", "ivf", "ivfpq", "rabitq", "hnsw"]
"""flat: exact, float32. flat16: half the size, exact but for float16's rounding. ivf: looks into
nprobe of nlist inverted lists. ivfpq: ivf over codes of about d / 6 bytes; float16 vectors on disk
re-rank what the codes propose. rabitq: the same over codes of one bit a dimension, on the CPU only.
hnsw: walks a graph, on the CPU only."""
IndexTypeChoice = Literal["auto", "flat", "flat16", "ivf", "ivfpq", "rabitq", "hnsw"]
"""auto: see `retrieval.index.choose`."""
INDEX_TYPES: tuple[IndexType, ...] = get_args(IndexType)
GPU_INDEX_TYPES = ("flat", "flat16", "ivf", "ivfpq")  # what FAISS can copy to a GPU

Device = Literal["auto", "cpu", "cuda", "shards", "replicas"]
"""cuda: one GPU. shards: all GPUs, a part of the vectors each. replicas: all GPUs, every vector on
each. auto: the GPUs where there are some, see `retrieval.index.gpus.spread`."""

LATENCY_MS = 10.0  # what one query may take
K_FACTOR = 10  # times k, that float16 vectors rank again where nothing was measured


def check_limits(latency_ms: float | None, memory_gib: float | None) -> None:
    """Raises `UsageError` for limits that cannot work; None is not given."""
    if latency_ms is not None and not latency_ms > 0:
        raise UsageError(f"latency_ms {latency_ms:g}: above 0")
    if memory_gib is not None and not memory_gib >= 0:
        raise UsageError(f"memory_gib {memory_gib:g}: at least 0, which is half of the memory")
