"""Kinds of FAISS index: which one fits, how one is made, how one is asked.

    flat    exact, float32             flat16  half the size, exact but for float16's rounding
    ivf     looks into some cells      ivfpq   ivf over codes of d / 6 bytes; float16 vectors on
    hnsw    walks a graph, CPU only            disk rank again what the codes propose

Every index is an inner product over unit-norm vectors, numbered 0, 1, ... inside an `IndexIDMap`.
Searches pass their parameters along; nothing here changes an index once it is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import faiss
import numpy as np
from jaxtyping import Float, UInt8

from data.errors import UsageError
from retrieval.index.nearest import pays, scan, stored_vectors

Kind = Literal["flat", "flat16", "ivf", "ivfpq", "hnsw"]
IndexKind = Literal["auto", "flat", "flat16", "ivf", "ivfpq", "hnsw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GPU_KINDS = ("flat", "flat16", "ivf", "ivfpq")  # what FAISS can copy to a GPU

# Bytes that one query scans in a second. One core of an EPYC measured 18e9 (float32) and 24e9
# (float16), half of it counted; an A100 reads about 1.5e12.
SCANNED_PER_S = {"cpu": 1e10, "cuda": 1e12}
PROBED_SHARE = 1 / 32  # of the vectors, by a search in cells
HNSW_LINKS = 32
HNSW_BUILD = 80  # efConstruction; 20,000 vectors of width 384 take 3 s on two cores
MAX_HNSW = 20_000_000  # vectors: an hour's build on two cores
# As few vectors as each kind can be trained on; fewer are held flat until they are more.
MIN_VECTORS = {"ivf": 39, "ivfpq": 256}
MAX_GPU = 2048  # k and nprobe that FAISS takes on a GPU
K_FACTOR = 10  # ivfpq ranks this many times k again by its float16 vectors
GPU_PQ_BYTES = (64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)  # per code, on any GPU


def bytes_per_vector(kind: Kind, width: int) -> int:
    """Memory that a search touches, per vector held."""
    return (
        8
        + {
            "flat": 4 * width,
            "flat16": 2 * width,
            "ivf": 4 * width + 8,
            "ivfpq": pq_bytes(width) + 8,
            "hnsw": 4 * width + 8 * HNSW_LINKS + 8,
        }[kind]
    )


def default_memory() -> int:
    """Bytes: half of the machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def choose_kind(
    count: int,
    width: int,
    cuda: bool,
    memory_bytes: int | None = None,
    latency_ms: float = 10.0,
) -> tuple[Kind, str]:
    """What `auto` means for `count` vectors, and why in one line.

    memory_bytes: what the index may take, of the CPU or of the GPUs; half of this machine's memory
    when not given. latency_ms: that one query may take.
    """
    memory_bytes = default_memory() if memory_bytes is None else memory_bytes
    speed = SCANNED_PER_S["cuda" if cuda else "cpu"]
    cells = num_cells(count) * width * 4
    scan_ms = {
        "flat": 1e3 * count * width * 4 / speed,
        "flat16": 1e3 * count * width * 2 / speed,
        "ivf": 1e3 * (cells + count * width * 4 * PROBED_SHARE) / speed,
    }
    fits = {kind: count * bytes_per_vector(kind, width) <= memory_bytes for kind in KINDS}
    have = f"{count:,} vectors of width {width} take {count * width * 4 / 2**20:,.1f} MiB"
    where = "GPU" if cuda else "CPU"
    exact = f"an exact scan about {scan_ms['flat']:,.1f} ms on this {where}"
    limits = f"allowed are {memory_bytes / 2**20:,.0f} MiB and {latency_ms:g} ms"
    scanned: tuple[Kind, ...] = ("flat", "flat16", "ivf")
    for kind in scanned:
        if fits[kind] and scan_ms[kind] <= latency_ms:
            return kind, f"{kind}: {have}, {exact}; {limits}"
    if not cuda and fits["hnsw"] and count <= MAX_HNSW:
        slow = f"cells about {scan_ms['ivf']:,.1f} ms"
        return "hnsw", f"hnsw: {have}, {exact}, {slow}; {limits}"
    kind = "ivf" if fits["ivf"] else "ivfpq"
    return kind, f"{kind}: {have}, {exact}; {limits}"


def held_as(kind: Kind, count: int) -> Kind:
    """The kind that holds `count` vectors of an index of `kind`: too few to train on are flat."""
    if count >= MIN_VECTORS.get(kind, 0):
        return kind
    return delta_kind(kind)


def delta_kind(kind: Kind) -> Kind:
    """The kind of an addition: exact, and as precise as what it will be merged into."""
    return "flat16" if kind in ("flat16", "ivfpq") else "flat"


def num_cells(count: int) -> int:
    """2 sqrt(n): training costs the square of it, 20 s for a million vectors on two cores."""
    return max(1, min(round(2 * count**0.5), count // 39))


def num_training(kind: Kind, count: int) -> int:
    """Vectors wanted to train an index of `kind` for `count` vectors."""
    if kind not in ("ivf", "ivfpq"):
        return 0
    return min(count, max(64 * num_cells(count), 40_000))


def pq_bytes(width: int) -> int:
    """Bytes of a product quantiser's code, eight bits each: about d / 6."""
    return next(m for m in GPU_PQ_BYTES if width % m == 0 and m <= max(1, width // 4))


def new_index(
    kind: Kind, width: int, count: int, sample: Float[np.ndarray, "n d"], gpus: int = 0
) -> faiss.IndexIDMap:
    """An empty index of `kind`, trained on `sample` for `count` vectors.

    gpus: how many of them share the k-means. Deterministic for one number of threads.
    """
    inner_product = faiss.METRIC_INNER_PRODUCT
    index: Any
    ivf: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, HNSW_LINKS, inner_product)
        index.hnsw.efConstruction = HNSW_BUILD
    elif kind == "flat16":
        index = _float16(width)
    else:
        cells = faiss.IndexFlatIP(width)
        nlist = num_cells(count)
        if kind == "ivf":
            index = ivf = faiss.IndexIVFFlat(cells, width, nlist, inner_product)
        else:
            ivf = faiss.IndexIVFPQ(cells, width, nlist, pq_bytes(width), 8, inner_product)
            ivf.pq.cp.min_points_per_centroid = 1  # a small index trains as well as it can
            index = faiss.IndexRefine(ivf, _float16(width))
        ivf.cp.spherical = True
        ivf.cp.min_points_per_centroid = 1
        if gpus:
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(width), ngpu=gpus)
        with _matrix_products():
            index.train(np.ascontiguousarray(sample, np.float32))
        if gpus:
            ivf.clustering_index = None
    return faiss.IndexIDMap(index)


@contextmanager
def _matrix_products() -> Iterator[None]:
    """FAISS's own default, which builds for recent CPUs raise to 128,000: above it, k-means is a
    matrix product. Cells for 100,000 vectors: 1.8 s instead of 6.5."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def _float16(width: int) -> faiss.IndexScalarQuantizer:
    quantizer = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(width, quantizer, faiss.METRIC_INNER_PRODUCT)


def kind_of(index: faiss.Index) -> Kind:
    """The kind of what lies inside an `IndexIDMap`. Raises `UsageError` for what is none."""
    for type_, kind in (
        (faiss.IndexFlat, "flat"),
        (faiss.IndexScalarQuantizer, "flat16"),
        (faiss.IndexIVFFlat, "ivf"),
        (faiss.IndexRefine, "ivfpq"),
        (faiss.IndexHNSW, "hnsw"),
    ):
        if isinstance(index, type_):
            return kind  # type: ignore[return-value]
    raise UsageError(f"{type(index).__name__} is no kind of index; allowed: {', '.join(KINDS)}")


def cells_of(index: faiss.Index) -> Any | None:
    """The part of an index that looks into cells, None where there is none."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.base_index)
    return index if isinstance(index, faiss.IndexIVF) else None


# ---- search --------------------------------------------------------------------------------


def search_params(
    index: faiss.Index, nprobe: int, ef: int, packed: UInt8[np.ndarray, " bytes"] | None = None
) -> Any | None:
    """Parameters of one call. packed: a bit per vector, little end first; only the set ones can be
    found."""
    kinds: Any = faiss  # whose stubs know no keywords
    selector = {} if packed is None else {"sel": kinds.IDSelectorBitmap(packed)}
    if isinstance(index, faiss.IndexRefine):
        base = search_params(faiss.downcast_index(index.base_index), nprobe, ef, packed)
        # The refinement itself asks no selector: it ranks what the base let through.
        return kinds.IndexRefineSearchParameters(k_factor=K_FACTOR, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        return kinds.SearchParametersIVF(nprobe=min(nprobe, index.nlist), **selector)
    if isinstance(index, faiss.IndexHNSW):
        return kinds.SearchParametersHNSW(efSearch=ef, **selector)
    return faiss.SearchParameters(**selector) if selector else None


def search(
    index: faiss.Index,
    queries: Float[np.ndarray, "q d"],
    k: int,
    nprobe: int,
    ef: int,
    packed: UInt8[np.ndarray, " bytes"] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(similarities, numbers), best first, -1 where there are fewer than k. packed: as in
    `search_params`."""
    if pays(len(queries), index.ntotal, packed):
        vectors = stored_vectors(index)
        if vectors is not None:
            return scan(vectors, queries, k, packed)
    return index.search(queries, k, params=search_params(index, nprobe, ef, packed))


def exact_part(index: faiss.Index) -> faiss.Index:
    """What of an index can be scanned whole: its stored vectors, or itself with every cell."""
    if isinstance(index, faiss.IndexRefine):
        return faiss.downcast_index(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.downcast_index(index.storage)
    return index


def exact_search(
    index: faiss.Index,
    queries: Float[np.ndarray, "q d"],
    k: int,
    packed: UInt8[np.ndarray, " bytes"] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(similarities, numbers) by a scan of every vector, or of those that `packed` sets."""
    part = exact_part(index)
    nprobe = part.nlist if isinstance(part, faiss.IndexIVF) else 1
    return search(part, queries, k, nprobe, 1, packed)
