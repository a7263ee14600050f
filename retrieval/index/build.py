"""A FAISS index per patch size, in a folder that is all a searcher needs, and its changes.

NAME/patch_28/image.index       inner product on unit-norm vectors, int64 ids; see segments.py
NAME/metadata/metadata_*.arrow  id, key, caption, shard, offset, size; found by id
NAME/deleted_*.npy              tombstones: ids that are no longer there
NAME/model/                     what `LitModel.from_pretrained` reads (a copy)
NAME/manifest.json              written last, replaced by every change

Additions become small exact segments, deletions tombstones; `compact_index` merges both. All of it
works beside any number of readers and one writer at a time. Ids are given once.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from tqdm import tqdm

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.embed.partitions import read_manifest
from retrieval.index.create import IndexKind, Kind, bytes_per_vector, choose_kind, delta_kind
from retrieval.index.gpus import Device, num_gpus
from retrieval.index.manifest import (
    LATENCY_MS,
    commit,
    new_folder,
    new_manifest,
    read_index_manifest,
    writing,
)
from retrieval.index.row_sources import EmbeddedShard, Piece, checked_schema, cut
from retrieval.index.segments import Living, Segment, write_segment
from retrieval.index.snapshot import Snapshot
from retrieval.index.tune import tune


def build_index(
    embeddings_dir: str | Path,
    out: str | Path,
    model_dir: str | Path = "",
    kind: IndexKind = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
) -> str:
    """Index every patch size of a folder written by `embed_shards`. Returns why this kind.

    model_dir: the model the embeddings come from; "" takes the one their manifest names.
    kind, latency_ms: see `retrieval.kinds`; latency_ms is what one query may take. memory_gib: what
    the index may take while it is built and searched, 0 for half of the memory of CPU or GPUs;
    what does not fit is built in several segments. Embeddings are read in blocks.
    Raises `UsageError` when `out` exists already, or when embeddings or model are missing.
    """
    embeddings = Path(embeddings_dir)
    source = read_manifest(embeddings)
    model = _find_model(str(model_dir or source["model"]), source["image_fingerprint"])
    return index_pieces(
        out, model, source | {"images": ""}, _embedded(embeddings, source), kind, device,
        latency_ms, memory_gib,
    )  # fmt: skip


def index_pieces(
    out: str | Path,
    model_dir: Path,
    described: dict[str, Any],
    pieces: Sequence[Piece],
    kind: IndexKind = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
) -> str:
    """`build_index` from rows anywhere, perhaps none. described: width, patch_sizes, fingerprints,
    and `images`, the folder that the pictures come from. Returns why this kind."""
    manifest = new_manifest(described, kind, device, latency_ms, memory_gib)
    with new_folder(Path(out), model_dir) as partial:
        manifest = commit(partial, manifest, _write_base(partial, manifest, pieces, device))
    return manifest["reason"]


def add_embeddings(folder: str | Path, embeddings_dir: str | Path) -> int:
    """Add a folder written by `embed_shards` to an index, under new ids. Returns how many images.

    Raises `UsageError` where it is of another image tower or misses a patch size of the index.
    """
    folder, embeddings = Path(folder), Path(embeddings_dir)
    source, manifest = read_manifest(embeddings), read_index_manifest(folder)
    if source["image_fingerprint"] != manifest["image_fingerprint"]:
        raise UsageError(f"{embeddings} was made with another image tower than {folder}")
    missing = set(manifest["patch_sizes"]) - set(source["patch_sizes"])
    if missing:
        raise UsageError(
            f"{embeddings} lacks patch size {max(missing)}, which {folder} has; embed at "
            f"{', '.join(map(str, manifest['patch_sizes']))}"
        )
    return change_index(folder, add=lambda first_id: _embedded(embeddings, source, first_id))[0]


def delete_ids(folder: str | Path, ids: Sequence[int]) -> int:
    """Take ids out of an index. Returns how many of them were there."""
    return change_index(folder, delete=ids)[1]


def change_index(
    folder: str | Path,
    delete: Sequence[int] = (),
    add: Callable[[int], Sequence[Piece]] | None = None,
) -> tuple[int, int]:
    """Delete ids and add rows, in one step that readers see whole.

    add: is given the first free id and returns the rows, with ids from there on. Additions of like
    size are merged, so that n of them make about log2(n) segments. Returns how many images were
    added and deleted. Raises `UsageError` while another program changes the index.
    """
    folder = Path(folder)
    with writing(folder):
        snapshot = Snapshot.open(folder)
        manifest = snapshot.manifest
        gone = np.intersect1d(np.array(sorted(set(delete)), np.int64), snapshot.ids())
        manifest = manifest | {"deleted_ids": np.union1d(snapshot.deleted, gone)}
        pieces = [piece for piece in add(manifest["next_id"]) if piece.count] if add else []
        count = sum(piece.count for piece in pieces)
        entries = list(manifest["segments"])
        if count:
            merged: list[Piece] = []
            total, limit = count, _rows_in_memory(delta_kind(manifest["kind"]), manifest)
            for segment in reversed(snapshot.segments):
                entry = entries[-1]
                if not entry["delta"] or entry["count"] > min(2 * total, limit - total):
                    break
                entries.pop()
                segment.alive &= ~np.isin(segment.ids, gone)
                merged.insert(0, Living(segment))
                total += merged[0].count
                manifest["deleted_ids"] = np.setdiff1d(manifest["deleted_ids"], segment.ids)
            kind = delta_kind(manifest["kind"])
            written = _write_segments(
                folder, manifest, kind, [*merged, *pieces], snapshot.columns, "adding"
            )
            entries += [entry | {"delta": True} for entry, _ in written]
        elif not len(gone):
            return 0, 0
        commit(folder, manifest, entries)
    return count, len(gone)


def compact_index(folder: str | Path, device: Device = "auto") -> str:
    """Merge additions and deletions into an index as a build would make it. Returns why its kind.

    Raises `UsageError` while another program changes the index.
    """
    folder = Path(folder)
    with writing(folder):
        snapshot = Snapshot.open(folder)
        manifest = snapshot.manifest
        changed = len(snapshot.deleted) or any(entry["delta"] for entry in manifest["segments"])
        if changed:
            pieces = [Living(segment) for segment in snapshot.segments]
            manifest = commit(folder, manifest, _write_base(folder, manifest, pieces, device))
    return manifest["reason"]


# ---- segments ------------------------------------------------------------------------------


def _write_base(
    folder: Path, manifest: dict[str, Any], pieces: Sequence[Piece], device: Device
) -> list[dict[str, Any]]:
    """All rows of `pieces` as large segments, as many as memory demands; names the kind in
    `manifest`."""
    count, width = sum(piece.count for piece in pieces), manifest["width"]
    gpus = num_gpus(device)
    if manifest["asked_kind"] == "auto":
        manifest["kind"], manifest["reason"] = choose_kind(
            count, width, gpus > 0, manifest["memory_bytes"], manifest["latency_ms"]
        )
    kind, sizes, width = manifest["kind"], manifest["patch_sizes"], manifest["width"]
    entries = []
    for entry, samples in _write_segments(
        folder, manifest, kind, pieces, None, f"indexing ({kind})", gpus
    ):
        opened = Segment(folder, entry, sizes, width, np.zeros(0, np.int64))
        latency_ms = manifest["latency_ms"] * entry["count"] / count
        entry["tuning"] = {
            str(size): tune(opened.inner[size], samples[size], latency_ms).to_json()
            for size in sizes
        }
        entries.append(entry | {"delta": False})
    return entries


def _write_segments(
    folder: Path,
    manifest: dict[str, Any],
    kind: Kind,
    pieces: Sequence[Piece],
    schema: pa.Schema | None,
    what: str,
    gpus: int = 0,
) -> Iterator[tuple[dict[str, Any], dict[int, Float[np.ndarray, "n d"]]]]:
    """All rows of `pieces` as segments, as many as memory demands: entries and samples of
    `write_segment`. schema: of the metadata, None for that of the first rows."""
    count, sizes = sum(piece.count for piece in pieces), manifest["patch_sizes"]
    num_segments = -(-count // _rows_in_memory(kind, manifest))
    if schema is None and count:
        ((first, *_),) = cut(pieces, 0, 1)
        schema = checked_schema(first.metadata(0, 1))
    with tqdm(total=count * len(sizes), desc=what, unit="vec", leave=False, delay=1) as bar:
        for part in range(num_segments):
            span = count * part // num_segments, count * (part + 1) // num_segments
            number = manifest["next_segment"] + part
            yield write_segment(
                folder, number, kind, pieces, span, sizes, manifest["width"], schema, gpus,
                bar.update,
            )  # fmt: skip


def _rows_in_memory(kind: Kind, manifest: dict[str, Any]) -> int:
    """Vectors of one segment: what is built fits the memory allowed."""
    width = manifest["width"]
    stored = bytes_per_vector(kind, width) + (2 * width if kind == "ivfpq" else 0)
    return max(1024, manifest["memory_bytes"] // stored)


def _embedded(embeddings: Path, source: dict[str, Any], first_id: int = 0) -> list[Piece]:
    return [
        EmbeddedShard(embeddings, number, partition["count"], first_id)
        for number, partition in enumerate(source["partitions"])
    ]


def _find_model(name: str, image_fingerprint: str) -> Path:
    """The folder of the model that the embeddings were made with, checked."""
    if not name or not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"no model at {name!r}; name the folder (config.json, model.safetensors) that the "
            "embeddings were made with"
        )
    if LitModel.from_pretrained(name).image_fingerprint != image_fingerprint:
        raise UsageError(
            f"the model at {name} has another image tower than the one the embeddings were made "
            "with; name that one, or embed again"
        )
    return Path(name)
