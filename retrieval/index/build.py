"""Building and changing an index: one FAISS index per patch size, in a folder (see `folder.py`).

A build writes large segments. Additions become small exact ones (delta segments), deletions
tombstones; `compact_index` turns both into large segments again. All of it works beside any number
of readers and one writer at a time. Ids are given once and never reused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.config import Fit
from data.errors import UsageError
from data.locks import only_writer
from data.progress import Progress
from retrieval.detail import Detail, coarsest, of_manifest, said
from retrieval.embed.manifest import check_shards, read_manifest
from retrieval.index.choose import (
    choose_index_type,
    default_memory,
    delta_type,
    needs_tuning,
    rows_in_memory,
)
from retrieval.index.config import (
    INDEX_TYPES,
    LATENCY_MS,
    Device,
    IndexType,
    IndexTypeChoice,
    check_limits,
)
from retrieval.index.folder import commit, local_folder, locked, new_folder
from retrieval.index.gpu_check import find_gpus, num_gpus
from retrieval.index.gpus import FAISS_BYTES, gpu_failures, gpu_memory
from retrieval.index.integrity import check_index, check_segment
from retrieval.index.manifest import IndexManifest, SegmentEntry, read_index_manifest
from retrieval.index.row_sources import RowSource, blocks, embedded_partitions, index_schema
from retrieval.index.segments import Segment, SurvivingRows, write_segment
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import Trial, caption_queries, tune
from retrieval.model_folder import check_model_folder, to_copy

Written = tuple[SegmentEntry, dict[Detail, Trial]]


def build_index(
    embeddings_dir: str | Path,
    out: str | Path,
    model_dir: str | Path = "",
    index_type: IndexTypeChoice = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
    *,
    kind: IndexTypeChoice | None = None,
) -> str:
    """Index a folder written by `embed_shards`. Returns the reason for the index type.

    model_dir: the model the embeddings come from; "" takes the one their manifest names.
    index_type, latency_ms: see `retrieval.index.config`. memory_gib: what the index may take while
    it is built and searched, 0 for half of the memory of CPU or GPUs; what does not fit is built in
    several segments. kind: the former name of index_type. Embeddings are read in blocks; an image
    that they hold twice counts once.
    Raises `UsageError` when `out` exists already or is in Milvus, when embeddings, images in them
    or the model are missing, and where embeddings are damaged or older than their shard.
    """
    folder, embeddings = local_folder(out), Path(embeddings_dir)
    source = read_manifest(embeddings)
    if not sum(partition["count"] for partition in source["partitions"]):
        raise UsageError(f"{embeddings} holds no image, so there is nothing to index")
    check_shards(embeddings, source)
    model = find_model(str(model_dir or source["model"]), source)
    manifest = new_manifest(
        source["image_fingerprint"], source["text_fingerprint"], source["width"],
        of_manifest(source), "", kind or index_type, device, latency_ms, memory_gib,
        fit=source.get("fit"),
    )  # fmt: skip
    with only_writer(folder):
        return index_rows(folder, model, manifest, embedded_partitions(embeddings, source), device)


def new_manifest(
    image_fingerprint: str,
    text_fingerprint: str,
    width: int,
    patch_sizes: Sequence[Detail],
    images: str = "",
    index_type: IndexTypeChoice = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
    fit: Fit | None = None,
) -> IndexManifest:
    """The manifest of an empty index. images: the folder that its photos come from. fit: by which
    the model reads images, None for its own.

    Raises `UsageError` for values that cannot work.
    """
    empty = IndexManifest(
        image_fingerprint=image_fingerprint,
        text_fingerprint=text_fingerprint,
        width=width,
        patch_sizes=tuple(patch_sizes),
        fit=fit,
        images=images,
    )
    return _asked(empty, index_type, device, latency_ms, memory_gib)


def _asked(
    manifest: IndexManifest,
    index_type: IndexTypeChoice | None,
    device: Device,
    latency_ms: float | None,
    memory_gib: float | None,
) -> IndexManifest:
    """By these choices, those that are given. Raises `UsageError` for values that cannot work."""
    check_limits(latency_ms, memory_gib)
    if index_type is not None and (index_type != manifest.asked_type or not manifest.reason):
        if index_type not in ("auto", *INDEX_TYPES):
            allowed = ", ".join(INDEX_TYPES)
            raise UsageError(f"index_type {index_type!r}: allowed are auto, {allowed}")
        manifest = replace(
            manifest,
            asked_type=index_type,
            index_type="flat" if index_type == "auto" else index_type,
            reason=f"{index_type}: as asked",
        )
    if latency_ms is not None:
        manifest = replace(manifest, latency_ms=latency_ms)
    if memory_gib is not None:
        default = default_memory()
        if num_gpus(device):
            default = min(default, gpu_memory() // 2)
        manifest = replace(manifest, memory_bytes=int(memory_gib * 2**30) or default)
    return manifest


def index_rows(
    out: str | Path,
    model: Path | LitModel,
    manifest: IndexManifest,
    sources: Sequence[RowSource],
    device: Device = "auto",
) -> str:
    """`build_index` from any source of rows, perhaps none. model: or its folder. manifest: of
    `new_manifest`. Returns the reason for its index type."""
    with new_folder(Path(out), model) as partial:
        manifest, segments = write_base(partial, manifest, sources, device, model)
        commit(partial, manifest, segments)
    return manifest.reason


def add_embeddings(folder: str | Path, embeddings_dir: str | Path) -> int:
    """Add a folder written by `embed_shards` to an index, under new ids. Returns how many images.

    Images that the index holds already (by shard, key, place and digest) are passed over. Raises
    `UsageError` where these are all, and for embeddings of another image tower or width, without a
    patch size of the index, damaged, or older than a shard.
    """
    folder, embeddings = local_folder(folder), Path(embeddings_dir)
    source = read_addition(embeddings, read_index_manifest(folder), str(folder))

    def add(first_id: int) -> list[RowSource]:
        held = [(segment.table, segment.alive) for segment in Snapshot.open(folder).segments]
        new = embedded_partitions(embeddings, source, first_id, held)
        if not new and source["partitions"]:
            raise UsageError(f"{folder} holds the images of {embeddings} already")
        return new

    return change_index(folder, add=add)[0]


def read_addition(embeddings: Path, manifest: IndexManifest, index: str) -> dict[str, Any]:
    """The manifest of embeddings that can be added to an index. Raises `UsageError`."""
    source = read_manifest(embeddings)
    if source["image_fingerprint"] != manifest.image_fingerprint:
        fits = [fit or "crop" for fit in (source.get("fit"), manifest.fit)]
        if fits[0] != fits[1]:
            raise UsageError(f"{embeddings} was made with fit {fits[0]}, {index} with {fits[1]}")
        raise UsageError(f"{embeddings} was made with another image tower than {index}")
    check_shards(embeddings, source)
    missing = set(manifest.patch_sizes) - set(of_manifest(source))
    if missing:
        raise UsageError(
            f"{embeddings} lacks {said(coarsest(missing))}, which {index} has; embed at "
            f"{said(*manifest.patch_sizes)}"
        )
    return source


def delete_ids(folder: str | Path, ids: Sequence[int]) -> int:
    """Delete ids from an index. Returns how many of them it held."""
    return change_index(folder, delete=ids)[1]


def absent_ids(folder: str | Path, ids: Sequence[int]) -> list[int]:
    """Those of `ids` that an index does not hold, in the order given."""
    snapshot = Snapshot.open(local_folder(folder))
    held = set(_held(snapshot, ids).tolist())
    return [id for id in ids if id not in held]


def _held(snapshot: Snapshot, ids: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Those of `ids` that the index holds, ascending."""
    possible = {id for id in ids if 0 <= id < snapshot.manifest.next_id}  # others may be no int64
    return np.intersect1d(np.array(sorted(possible), np.int64), snapshot.ids())


def change_index(
    folder: str | Path,
    delete: Sequence[int] = (),
    add: Callable[[int], Sequence[RowSource]] | None = None,
) -> tuple[int, int]:
    """Delete ids and add rows in one atomic step.

    add: is given the first free id and returns the rows, with ids from there on. Delta segments of
    like size are merged, so that n additions make about log2(n) of them. Returns how many images
    were added and deleted. Raises `UsageError` while another program changes the index.
    """
    folder = local_folder(folder)
    with locked(folder):
        snapshot = Snapshot.open(folder)
        manifest = snapshot.manifest
        gone = _held(snapshot, delete)
        tombstones = np.union1d(snapshot.tombstones, gone)
        sources = [source for source in add(manifest.next_id) if source.count] if add else []
        count = sum(source.count for source in sources)
        segments = list(manifest.segments)
        if count:
            type_ = delta_type(manifest.index_type)
            merged: list[RowSource] = []
            total = count
            limit = rows_in_memory(type_, manifest.width, manifest.memory_bytes)
            for segment in reversed(snapshot.segments):
                entry = segments[-1]
                if not entry.delta or entry.count > min(2 * total, limit - total):
                    break
                check_segment(folder, segments.pop(), manifest.patch_sizes)
                segment.alive &= ~np.isin(segment.ids, gone)
                merged.insert(0, SurvivingRows(segment))
                total += merged[0].count
                tombstones = np.setdiff1d(tombstones, segment.ids)
            written = _write_segments(
                folder, manifest, type_, [*merged, *sources], snapshot.columns, "adding"
            )
            segments += [replace(entry, delta=True) for entry, _ in written]
        elif not len(gone):
            return 0, 0
        commit(folder, manifest, segments, tombstones)
    return count, len(gone)


def compact_index(
    folder: str | Path,
    device: Device = "auto",
    index_type: IndexTypeChoice | None = None,
    latency_ms: float | None = None,
    memory_gib: float | None = None,
) -> str:
    """Merge additions and deletions into large segments. Returns the reason for the index type.

    index_type, latency_ms, memory_gib: as of `build_index`, where they are to change; the index is
    then built anew from its own vectors, which those of flat16, ivfpq and rabitq hold rounded.
    Raises `UsageError` while another program changes the index, for a damaged file, and for values
    that cannot work.
    """
    folder = local_folder(folder)
    with locked(folder):
        check_index(folder, read_index_manifest(folder))  # damage is not to get a good digest
        snapshot = Snapshot.open(folder)
        manifest = _asked(snapshot.manifest, index_type, device, latency_ms, memory_gib)
        changed = len(snapshot.tombstones) or any(entry.delta for entry in manifest.segments)
        if changed or manifest != snapshot.manifest or index_type == "auto":  # picks anew
            sources = [SurvivingRows(segment) for segment in snapshot.segments]
            model = folder / "model"
            manifest, segments = write_base(folder, manifest, sources, device, model)
            commit(folder, manifest, segments)
    return manifest.reason


# ---- segments ------------------------------------------------------------------------------


def write_base(
    folder: Path,
    manifest: IndexManifest,
    sources: Sequence[RowSource],
    device: Device,
    model: Path | LitModel,
) -> tuple[IndexManifest, list[SegmentEntry]]:
    """All rows of `sources` as large segments, as many as memory demands. The manifest returned
    names their index type. model: or its folder, encodes the captions that they are tuned by."""
    count, width = sum(source.count for source in sources), manifest.width
    gpus = num_gpus(device)
    if manifest.asked_type == "auto":
        index_type, reason = choose_index_type(
            count, width, gpus > 0, manifest.memory_bytes, manifest.latency_ms
        )
        manifest = replace(manifest, index_type=index_type, reason=reason)
    index_type, sizes = manifest.index_type, manifest.patch_sizes
    segments, captions = [], None
    if needs_tuning(index_type, count):
        captions = caption_queries(sources, model, "cuda" if gpus else "cpu", width)
    written = _write_segments(
        folder, manifest, index_type, sources, None, f"indexing ({index_type})", device, captions
    )
    for entry, trials in written if device == "cpu" else gpu_failures(written):
        opened = Segment(folder, entry, sizes, width, np.zeros(0, np.int64))  # owns its indexes
        latency_ms = manifest.latency_ms * entry.count / count
        tuning = {size: tune(opened.indexes[size], t, latency_ms) for size, t in trials.items()}
        segments.append(replace(entry, tuning=tuning))
    return manifest, segments


def _write_segments(
    folder: Path,
    manifest: IndexManifest,
    index_type: IndexType,
    sources: Sequence[RowSource],
    schema: pa.Schema | None,
    what: str,
    device: Device = "cpu",
    captions: Float[np.ndarray, "q d"] | None = None,
) -> Iterator[Written]:
    """All rows of `sources` as segments, as many as memory demands: what `write_segment` returns.
    schema: of the metadata, None for that of the first rows."""
    count, sizes = sum(source.count for source in sources), manifest.patch_sizes
    gpus = num_gpus(device)
    on = torch.device("cuda", 0) if gpus else None
    gpus = gpus if gpus and find_gpus().faiss and gpu_memory() > FAISS_BYTES else 0
    num_segments = -(-count // rows_in_memory(index_type, manifest.width, manifest.memory_bytes))
    if schema is None and count:
        ((first, *_),) = blocks(sources, 0, 1)
        schema = index_schema(first.metadata(0, 1))
    with Progress(total=count * len(sizes), desc=what, unit="vec", leave=False, delay=1) as bar:
        for part in range(num_segments):
            span = count * part // num_segments, count * (part + 1) // num_segments
            number = manifest.next_segment + part
            yield write_segment(
                folder, number, index_type, sources, span, sizes, manifest.width, schema, gpus, on,
                bar.update, captions,
            )  # fmt: skip


def find_model(name: str, source: Mapping[str, Any]) -> Path | LitModel:
    """The model that the embeddings of a manifest were made with, checked."""
    check_model_folder(name)
    model = LitModel.from_pretrained(name)
    if with_fit(model, source.get("fit")).image_fingerprint != source["image_fingerprint"]:
        raise UsageError(
            f"the model at {name} has another image tower than the one the embeddings were made "
            "with; name that one, or embed again"
        )
    return to_copy(name, model)
