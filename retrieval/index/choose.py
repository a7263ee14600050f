"""Which index type fits a number of vectors, and what each type takes of memory."""

import os

from retrieval.index.config import INDEX_TYPES, IndexType

# Bytes that one query scans in a second. One core of an EPYC measured 18e9 (float32) and 24e9
# (float16), half of it counted; an A100 reads about 1.5e12.
SCANNED_PER_S = {"cpu": 1e10, "cuda": 1e12}
PROBED_SHARE = 1 / 32  # of the vectors, by a search in inverted lists
HNSW_LINKS = 32
MAX_HNSW = 20_000_000  # vectors: an hour's build on two cores
# As few vectors as each type can be trained on; fewer are held flat until they are more.
MIN_VECTORS = {"ivf": 39, "ivfpq": 256, "rabitq": 39}
RERANKED = {"ivfpq", "rabitq"}  # by float16 vectors in the same file, which stay on disk
GPU_PQ_BYTES = (64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)  # per code, on any GPU


def choose_index_type(
    count: int,
    width: int,
    cuda: bool,
    memory_bytes: int | None = None,
    latency_ms: float = 10.0,
) -> tuple[IndexType, str]:
    """What `auto` means for `count` vectors, and why in one line.

    memory_bytes: what the index may take, of the CPU or of the GPUs; half of this machine's memory
    when not given. latency_ms: that one query may take.
    """
    memory_bytes = default_memory() if memory_bytes is None else memory_bytes
    speed = SCANNED_PER_S["cuda" if cuda else "cpu"]
    centroids = num_lists(count) * width * 4
    scan_ms = {
        "flat": 1e3 * count * width * 4 / speed,
        "flat16": 1e3 * count * width * 2 / speed,
        "ivf": 1e3 * (centroids + count * width * 4 * PROBED_SHARE) / speed,
    }
    fits = {type_: count * bytes_per_vector(type_, width) <= memory_bytes for type_ in INDEX_TYPES}
    have = f"{count:,} vectors of width {width} take {count * width * 4 / 2**20:,.1f} MiB"
    where = "GPU" if cuda else "CPU"
    exact = f"an exact scan about {scan_ms['flat']:,.1f} ms on this {where}"
    limits = f"allowed are {memory_bytes / 2**20:,.0f} MiB and {latency_ms:g} ms"
    scanned: tuple[IndexType, ...] = ("flat", "flat16", "ivf")
    for type_ in scanned:
        if fits[type_] and scan_ms[type_] <= latency_ms:
            return type_, f"{type_}: {have}, {exact}; {limits}"
    if not cuda and fits["hnsw"] and count <= MAX_HNSW:
        slow = f"inverted lists about {scan_ms['ivf']:,.1f} ms"
        return "hnsw", f"hnsw: {have}, {exact}, {slow}; {limits}"
    type_ = "ivf" if fits["ivf"] else "ivfpq"
    return type_, f"{type_}: {have}, {exact}; {limits}"


def default_memory() -> int:
    """Half of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def bytes_per_vector(index_type: IndexType, width: int) -> int:
    """Memory that a search touches, per vector held."""
    return (
        8
        + {
            "flat": 4 * width,
            "flat16": 2 * width,
            "ivf": 4 * width + 8,
            "ivfpq": pq_bytes(width) + 8,
            "rabitq": -(-width // 8) + 8 + 8,  # a bit each, and two numbers for the estimate
            "hnsw": 4 * width + 8 * HNSW_LINKS + 8,
        }[index_type]
    )


def rows_in_memory(index_type: IndexType, width: int, memory_bytes: int) -> int:
    """Vectors of one segment: what is built fits the memory allowed."""
    stored = bytes_per_vector(index_type, width) + (2 * width if index_type in RERANKED else 0)
    return max(1024, memory_bytes // stored)


def pq_bytes(width: int) -> int:
    """Bytes of a product quantiser's code, eight bits each: about d / 6."""
    return next(m for m in GPU_PQ_BYTES if width % m == 0 and m <= max(1, width // 4))


def num_lists(count: int) -> int:
    """nlist, 2 sqrt(n): training costs the square of it, 20 s for a million vectors on two
    cores."""
    return max(1, min(round(2 * count**0.5), count // 39))


def type_for_count(index_type: IndexType, count: int) -> IndexType:
    """The type that holds `count` vectors of an index: too few to train on stay flat."""
    if count >= MIN_VECTORS.get(index_type, 0):
        return index_type
    return delta_type(index_type)


def needs_tuning(index_type: IndexType, count: int) -> bool:
    """Whether an index of `count` vectors looks at some of them only."""
    return type_for_count(index_type, count) not in ("flat", "flat16")


def delta_type(index_type: IndexType) -> IndexType:
    """The type of a delta segment: exact, and as precise as what it will be compacted into."""
    return "flat16" if index_type in ("flat16", *RERANKED) else "flat"
