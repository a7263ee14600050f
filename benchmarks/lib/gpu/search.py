"""An index of a million vectors: built, and searched beside bare FAISS."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from lib.gpu.results import Measured
from lib.gpu.scale import CUDA, Scale
from lib.harness import Target, Timings, interleave
from lib.vectors import rows_of, synthetic
from retrieval.index.build import index_rows, new_manifest
from retrieval.index.config import Device, IndexType
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import overlap

PATCH, K = 16, 10
QUERIES = (1, 32, 1_024)
ROUNDS = {1: 200, 32: 50, 1_024: 20}
WHERE: Device = "cuda" if CUDA else "cpu"


def _vectors(scale: Scale, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, queries), made once."""
    files = folder / "vectors.npy", folder / "queries.npy"
    if not files[1].is_file():
        folder.mkdir(parents=True, exist_ok=True)
        clusters = max(1, scale.vectors // 200)
        for file, count, seed in ((files[0], scale.vectors, 1), (files[1], QUERIES[-1], 2)):
            np.save(file, synthetic(count, seed, clusters, scale.embed_width))
    return np.load(files[0]), np.load(files[1])


def _build(folder: Path, vectors: np.ndarray, index_type: IndexType) -> tuple[Path, float]:
    """Builds an index; returns its folder and the seconds that took."""
    out, model = folder / index_type, folder / "no model"
    shutil.rmtree(out, ignore_errors=True)
    model.mkdir(exist_ok=True)
    rows = rows_of(vectors, PATCH)
    start = time.perf_counter()
    manifest = new_manifest("", "", vectors.shape[1], [PATCH], "", index_type, device=WHERE)
    index_rows(out, model, manifest, [rows], WHERE)
    return out, time.perf_counter() - start


def _bare(index: Any, nprobe: int | None) -> Callable[[np.ndarray], Any]:
    """FAISS's own search, on the GPU where there is one, with resources of its own."""
    types: Any = faiss  # whose stubs know no keywords
    params = None if nprobe is None else types.SearchParametersIVF(nprobe=nprobe)
    if not CUDA:
        return lambda queries: index.search(queries, K, params=params)
    resources = faiss.StandardGpuResources()
    copy = faiss.index_cpu_to_gpu(resources, 0, index)

    def search(queries: np.ndarray, kept: Any = resources) -> Any:
        return copy.search(queries, K, params=params)

    return search


def _side_by_side(
    snapshot: Snapshot, bare: Callable[[np.ndarray], Any], queries: np.ndarray, scale: Scale
) -> dict[int, Timings]:
    found = {}
    for count in QUERIES:
        asked = np.ascontiguousarray(queries[:count])
        fns: dict[str, Callable[[], object]] = {
            "Snapshot": partial(snapshot.nearest, asked, K, PATCH),
            "FAISS": partial(bare, asked),
        }
        found[count] = interleave(fns, 2 if scale.tiny else ROUNDS[count], warmup=3)
    return found


def lists(scale: Scale, folder: Path) -> Measured:
    """An ivf: building it, and queries/s against bare FAISS on the same lists."""
    vectors, queries = _vectors(scale, folder)
    out, first = _build(folder, vectors, "ivf")  # with what a process does once: kernels, a trial
    out, seconds = _build(folder, vectors, "ivf")
    snapshot = Snapshot.open(out, WHERE)
    (segment,) = snapshot.segments
    tuning = segment.tuning(PATCH)
    exact = faiss.knn(queries[:64], vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    timings = _side_by_side(snapshot, _bare(segment.indexes[PATCH], tuning.nprobe), queries, scale)
    figures = {
        "vectors": len(vectors),
        "width": vectors.shape[1],
        "build_s": seconds,
        "first_build_s": first,
        "nprobe": tuning.nprobe,
        "recall_at_10": overlap(snapshot.nearest(queries[:64], K, PATCH)[1], exact),
        "queries_per_s": {
            str(count): {name: count / times.median(name) for name in times.seconds}
            for count, times in timings.items()
        },
        "times": {str(count): times.figures() for count, times in timings.items()},
    }
    what = f"index of {scale.vectors:,} vectors of width {scale.embed_width}"
    targets = [Target(f"{what}, ivf: seconds to build", "<= 10", seconds)]
    for count, times in timings.items():
        ratio = times.ratio("FAISS", "Snapshot")
        targets.append(Target(f"{what}, ivf: queries/s over FAISS's, {count:,}", ">= 0.8", ratio))
    return figures, targets


def exactly(scale: Scale, folder: Path) -> Measured:
    """Exact search of float32 and float16 vectors, beside FAISS's."""
    vectors, queries = _vectors(scale, folder)
    figures: dict[str, Any] = {}
    targets = []
    expected = faiss.knn(queries[:64], vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    types: tuple[IndexType, ...] = ("flat", "flat16")
    for index_type in types:
        out, seconds = _build(folder, vectors, index_type)
        snapshot = Snapshot.open(out, WHERE)
        bare = _bare(snapshot.segments[0].indexes[PATCH], None)
        timings = _side_by_side(snapshot, bare, queries, scale)
        ms = 1e3 * timings[1].median("Snapshot")
        figures[index_type] = {
            "build_s": seconds,
            "recall_at_10": overlap(snapshot.nearest(queries[:64], K, PATCH)[1], expected),
            "ms": {
                str(count): {name: 1e3 * times.median(name) for name in times.seconds}
                for count, times in timings.items()
            },
        }
        what = f"one exact query of {scale.vectors:,} vectors of width {scale.embed_width}"
        targets.append(Target(f"{what}, {index_type}: ms", "<= 1", ms))
    return figures, targets
