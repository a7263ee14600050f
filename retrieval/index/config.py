"""What an index can be and where it can be searched: choices and defaults, without FAISS."""

from typing import Literal, get_args

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
