"""manifest.json says what an index folder holds. It is replaced, never changed.

Whoever changes an index writes new files beside the old, replaces the manifest, and then removes
the files that no manifest names any more.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from data.errors import UsageError
from retrieval.embed.partitions import write_json
from retrieval.index.create import KINDS, IndexKind, default_memory
from retrieval.index.gpus import Device, gpu_memory, num_gpus
from retrieval.index.segments import index_file, rows_file

LATENCY_MS = 10.0


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises `UsageError` if it has none."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); build the index again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != 1 or "segments" not in manifest:
        raise UsageError(f"{folder} holds no index of format 1; launch/index.py makes one")
    return manifest


def deleted_file(folder: Path, generation: int) -> Path:
    """Where the tombstones lie that change number `generation` wrote: ids, ascending."""
    return folder / f"deleted_{generation:04d}.npy"


def new_manifest(
    described: dict[str, Any],
    kind: IndexKind,
    device: Device,
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
) -> dict[str, Any]:
    """Of an index that holds nothing. Raises `UsageError` for values that cannot work."""
    if kind not in ("auto", *KINDS):
        raise UsageError(f"kind {kind!r}: allowed are auto, {', '.join(KINDS)}")
    if not latency_ms > 0 or not memory_gib >= 0:
        raise UsageError(f"latency_ms {latency_ms:g} and memory_gib {memory_gib:g}: above 0")
    cuda = num_gpus(device) > 0
    default = gpu_memory() if cuda else default_memory()
    keep = ("image_fingerprint", "text_fingerprint", "width", "patch_sizes", "images")
    return {
        "format": 1,
        **{name: described[name] for name in keep},
        "count": 0,
        "asked_kind": kind,
        "kind": "flat" if kind == "auto" else kind,
        "reason": f"{kind}: as asked",
        "latency_ms": latency_ms,
        "memory_bytes": int(memory_gib * 2**30) or default,
        "generation": 0,
        "next_id": 0,
        "next_segment": 0,
        "deleted": "",
        "segments": [],
    }


def commit(
    folder: Path, manifest: dict[str, Any], entries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Make `entries` the index; then remove the files that no manifest names any more."""
    manifest = dict(manifest)
    generation = manifest["generation"] + 1
    deleted: Int[np.ndarray, " t"] = manifest.pop("deleted_ids", np.zeros(0, np.int64))
    manifest["deleted"] = ""
    if len(deleted):
        np.save(deleted_file(folder, generation), deleted, allow_pickle=False)
        manifest["deleted"] = deleted_file(folder, generation).name
    manifest["generation"] = generation
    manifest["segments"] = list(entries)
    manifest["count"] = sum(entry["count"] for entry in entries) - len(deleted)
    numbers = [entry["number"] + 1 for entry in entries]
    manifest["next_segment"] = max([manifest["next_segment"], *numbers])
    manifest["next_id"] = max([manifest["next_id"], *(entry["last_id"] + 1 for entry in entries)])
    write_json(folder / "manifest.json", manifest)
    _sweep(folder, manifest)
    return manifest


def _sweep(folder: Path, manifest: dict[str, Any]) -> None:
    """Readers that have opened a file keep it."""
    numbers = [entry["number"] for entry in manifest["segments"]]
    kept = {folder / manifest["deleted"]} | {rows_file(folder, n) for n in numbers}
    kept |= {index_file(folder, size, n) for size in manifest["patch_sizes"] for n in numbers}
    for pattern in ("patch_*/image*.index*", "metadata/metadata_*.arrow*", "deleted_*.npy"):
        for file in folder.glob(pattern):
            if file not in kept:
                file.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path, model: Path) -> Iterator[Path]:
    """A folder that gets its name when everything is in it."""
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} exists already; give another name, or remove it first")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    # Copied, not linked: a model folder that is written again in place must not change the index.
    shutil.copytree(model, partial / "model")
    partial.rename(out)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with its process."""
    read_index_manifest(folder)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another program is changing {folder}; try again later") from error
        yield
