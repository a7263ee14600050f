"""Copies of an index on GPUs, how several GPUs share its vectors, and graphs that a GPU makes.

Exact types are searched by torch (see `exact.py`), inverted lists by FAISS. FAISS works on streams
of its own and takes and returns memory of the CPU, which orders its work and torch's.
"""

import re
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int

from data.errors import UsageError
from data.progress import say_once
from retrieval.index.choose import GPU_PQ_BYTES
from retrieval.index.config import GPU_INDEX_TYPES, K_FACTOR, Device, IndexType
from retrieval.index.exact import ExactVectors
from retrieval.index.faiss_setup import faiss
from retrieval.index.filters import Selection
from retrieval.index.gpu_check import find_gpus, num_gpus, one_line
from retrieval.index.nearest import (
    Found,
    nearest,
    nearest_exactly,
    search_params,
    stored_vectors,
)

MAX_GPU = 2048  # k and nprobe that FAISS takes on a GPU
TEMP_BYTES = 512 * 2**20  # FAISS's scratch memory on each GPU; it would take three times as much
# On each GPU, for FAISS to work at all: it ends the process where CUDA's libraries find no memory.
FAISS_BYTES = 2 * TEMP_BYTES
SHARED_BYTES = 48 * 1024  # of every GPU, for a query's look-up tables: 256 entries a byte of code
MIN_LINKED = 100_000  # vectors from which on a GPU links an hnsw; fewer take a CPU seconds
LINKED_RECALL = 0.985  # of the ten nearest to CHECKED of its own vectors, that such a graph finds
CHECKED, CHECKED_EF = 256, 256
LINKED_ROWS = 65_536  # whose links are written at once

T = TypeVar("T")

# FAISS's resources of a GPU serve one thread at a time, also where an index is freed.
gpu_lock = threading.RLock()


def gpu_memory() -> int:
    """Free bytes of the GPU that has fewest; what torch keeps without need is given back first."""
    torch.cuda.empty_cache()
    return min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))


def gpu_failures(items: Iterable[T]) -> Iterator[T]:
    """The same. Raises `UsageError` where a GPU has no memory left, or fails otherwise, while an
    index is built."""
    try:
        yield from items
    except RuntimeError as error:
        raise UsageError(
            f"a GPU failed while the index was built ({one_line(str(error))}); allowed: device cpu"
        ) from error


def say_cpu_searches(error: RuntimeError) -> None:
    """Why a GPU has left a search to the CPU; once, whatever the bytes in it."""
    why = re.sub(r"\d[\d.,]*", "N", one_line(str(error)))
    say_once(f"searching on the CPU where the GPU fails ({why})")


# ---- what GPUs can hold --------------------------------------------------------------------


def float16_tables(index_type: IndexType, width: int, code_bytes: int = 0) -> bool:
    """Whether a GPU holds the look-up tables of an ivf, or an ivfpq of codes of so many bytes, as
    float16, because float32 ones need too much memory. Raises `UsageError` for what GPUs cannot
    hold.

    A query's tables of an ivfpq lie in shared memory: 4 bytes x 256 a byte of code, 2 as float16
    (recall at ten 0.946 as on the CPU, at width 512). So codes of up to 48 bytes have float32 ones.
    """
    if index_type not in ("ivf", "ivfpq"):
        raise UsageError(
            f"FAISS has no {index_type} on GPUs; allowed: auto, cpu, or an index of type "
            f"{', '.join(GPU_INDEX_TYPES)}"
        )
    if index_type == "ivf":
        return False
    if code_bytes not in GPU_PQ_BYTES or width % code_bytes:
        sizes = ", ".join(map(str, sorted(GPU_PQ_BYTES)))
        raise UsageError(
            f"FAISS has no codes of {code_bytes} bytes for width {width} on GPUs; allowed: "
            f"{sizes}, which a newly built index has, or auto, cpu"
        )
    return 4 * 256 * code_bytes > SHARED_BYTES


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


# ---- copies --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def resources() -> list[Any]:
    """FAISS's memory and streams on each GPU, one for all indexes of this process."""
    made = []
    for _ in range(find_gpus().count):
        one = faiss.StandardGpuResources()
        one.setTempMemory(TEMP_BYTES)
        one.setPinnedMemory(0)  # for queries of more than 256 MiB at once
        made.append(one)
    return made


def copy_to_gpus(index: Any, gpus: int, float16: bool = False) -> Any:
    """FAISS's copy of an index on the first `gpus` GPUs, a part of its lists on each."""
    cloner = faiss.GpuMultipleClonerOptions()
    cloner.use_cuvs = False  # one behaviour, whichever FAISS is installed
    cloner.shard = gpus > 1
    cloner.useFloat16 = float16  # of look-up tables
    with gpu_lock:
        try:
            return faiss.index_cpu_to_gpu_multiple_py(resources()[:gpus], index, cloner)
        except RuntimeError:
            # FAISS takes those that got no scratch memory for whole, and ends the process with them
            resources.cache_clear()
            raise


class ListsOnGpus:
    """Inverted lists (ivf, ivfpq) on GPUs. Of ivfpq the codes go there, the float16 vectors for
    re-ranking stay memory-mapped."""

    def __init__(self, index: Any, index_type: IndexType, gpus: int) -> None:
        lists: Any = index
        if index_type == "ivfpq":
            lists = faiss.downcast_index(index.base_index)
        code_bytes = lists.pq.M if index_type == "ivfpq" else 0
        float16 = float16_tables(index_type, index.d, code_bytes)
        self._on_cpu, self.count, self._reranks = index, index.ntotal, index_type == "ivfpq"
        self._lists = self._index = copy_to_gpus(lists, gpus, float16)
        if index_type == "ivfpq":
            self._refined_by = faiss.downcast_index(index.refine_index)
            self._index = faiss.IndexRefine(self._lists, self._refined_by)

    def __del__(self) -> None:
        with gpu_lock:
            self.__dict__.clear()

    def nearest(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        nprobe: int,
        k_factor: int,
        chosen: Selection | None,
    ) -> Found | None:
        """As many as k, best first; None where a GPU cannot look as deep. FAISS filters nothing
        there, so more are fetched, and those that the filter excludes dropped. k_factor: as much of
        it as a GPU can, and K_FACTOR at least."""
        share = 1.0 if chosen is None else chosen.count / self.count
        # If matches are evenly spread, k/share hits contain k of them; fetch twice that.
        deeper = k if chosen is None else min(int(2 * k / share) + 16, self.count)
        if deeper * (K_FACTOR if self._reranks else 1) > MAX_GPU:
            return None
        k_factor = min(k_factor, MAX_GPU // deeper)
        params = search_params(self._on_cpu, min(nprobe, MAX_GPU), 1, k_factor=k_factor)
        try:
            with gpu_lock:
                found = self._index.search(queries, deeper, params=params)
        except RuntimeError as error:  # without memory, for what others hold
            say_cpu_searches(error)
            return None
        return found if chosen is None else _drop(found, chosen, k)


def _drop(
    found: tuple[Float[np.ndarray, "q deeper"], Int[np.ndarray, "q deeper"]],
    chosen: Selection,
    k: int,
) -> Found:
    """What a search without a filter found, less what the filter excludes."""
    similarities, rows = found
    rows = np.where((rows >= 0) & chosen.mask[rows], rows, -1)
    order = np.argsort(rows < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


def to_gpus(
    index: Any, index_type: IndexType, device: Device, bytes_held: int
) -> ExactVectors | ListsOnGpus | None:
    """A copy of `index` on the GPUs, None where it stays on the CPU.

    bytes_held: that its vectors take. Raises `UsageError` when a GPU is asked for and the index
    cannot go there; with `auto` it stays on the CPU, and stderr is told once.
    """
    gpus = num_gpus(device)
    if not gpus or (index_type == "hnsw" and device == "auto"):
        return None
    try:
        vectors = stored_vectors(index)
        how = spread(index_type, device, 2 * bytes_held <= gpu_memory()) if gpus > 1 else "shards"
        if vectors is not None:
            devices = [torch.device("cuda", gpu) for gpu in range(gpus)]
            return ExactVectors(vectors, devices, replicas=how == "replicas")
        if index_type in GPU_INDEX_TYPES and not find_gpus().faiss:
            raise UsageError(f"{find_gpus().problem}; allowed: auto, cpu")
        if bytes_held // gpus + FAISS_BYTES > gpu_memory():
            raise torch.OutOfMemoryError
        return ListsOnGpus(index, index_type, gpus)
    except torch.OutOfMemoryError:
        problem = f"its {bytes_held / 2**20:,.0f} MiB do not fit the GPU's memory"
    except RuntimeError as error:  # FAISS: no memory, or what it cannot copy
        problem = str(error).strip().splitlines()[-1][:160] if str(error).strip() else "FAISS fails"
    except UsageError as error:
        problem = str(error)
    if device != "auto":
        prefix = "" if problem.startswith("device ") else f"device {device}: "
        raise UsageError(f"{prefix}{problem}")
    say_once(f"the {index_type} index is searched on the CPU: {problem}")
    return None


# ---- graphs --------------------------------------------------------------------------------


def cagra_graph(vectors: Float[np.ndarray, "n d"], links: int) -> Int[np.ndarray, "n links"]:
    """The rows that each of some unit vectors is linked to, by CAGRA (Ootomo et al. 2023,
    arXiv:2308.15136) on the first GPU, which `faiss-gpu-cuvs` has."""
    types: Any = faiss  # whose stubs know no CAGRA
    config = types.GpuIndexCagraConfig()
    config.graph_degree, config.intermediate_graph_degree = links, 2 * links
    config.guarantee_connectivity = True  # clusters of like images are found from elsewhere too
    config.store_dataset = False  # nobody searches there
    count, width = vectors.shape
    with gpu_lock:
        # unit vectors rank by L2 as by inner product
        index = types.GpuIndexCagra(resources()[0], width, faiss.METRIC_L2, config)
        index.train(vectors)
        graph = index.get_knngraph()  # of int64
        del index
    return faiss.rev_swig_ptr(graph.data(), graph.size()).astype(np.int32).reshape(count, links)


def link_by_gpu(index: Any) -> str:
    """Links the lowest level of an `IndexHNSWFlat` to which vectors were added without (see
    `new_index`), as FAISS itself makes an hnsw of a CAGRA index. Returns why the graph cannot be
    used, nothing where it finds its own vectors' neighbours."""
    vectors, hnsw = stored_vectors(faiss.downcast_index(index.storage)), index.hnsw
    assert vectors is not None, "an hnsw of plain vectors"
    links = hnsw.nb_neighbors(0)
    try:
        graph = cagra_graph(vectors, links)
    except (RuntimeError, MemoryError) as error:  # MemoryError: FAISS's of the GPU's memory too
        return f"the GPU fails ({one_line(str(error))})"
    if graph.min() < 0 or graph.max() >= len(vectors):
        return "the GPU links vectors that there are not"
    starts = faiss.vector_to_array(hnsw.offsets)[:-1].astype(np.int64)
    neighbors = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    for row in range(0, len(vectors), LINKED_ROWS):
        rows = slice(row, row + LINKED_ROWS)
        neighbors[starts[rows, None] + np.arange(links)] = graph[rows]
    index.init_level0 = True
    queries = vectors[:: max(1, len(vectors) // CHECKED)][:CHECKED].copy()
    best = nearest_exactly(index, queries, 10)[0]
    found = nearest(index, queries, 10, 1, CHECKED_EF)[0]
    share = float((found >= best[:, -1:] - 1e-5).mean())  # equal ones count, whichever is found
    return "" if share >= LINKED_RECALL else f"the GPU's graph finds {share:.1%} of the nearest"
