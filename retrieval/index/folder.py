"""The files of an index folder, and how one change of them follows another.

NAME/patch_28/image.index           segment 0: inner product on unit-norm vectors, int64 ids
NAME/patch_28/image_0007.index      a later segment
NAME/tokens_64/image.index          the same of an index by budgets of tokens
NAME/metadata/metadata_0000.arrow   its rows, in the vectors' order, ids ascending
NAME/words/words_0000.sqlite        the words of its texts, see `retrieval.words`
NAME/deleted_0003.npy               tombstones: the deleted ids, ascending
NAME/regions/                       an index of parts of its pictures, see `retrieval.regions`
NAME/model/                         what `LitModel.from_pretrained` reads (a copy)
NAME/manifest.json                  written last, replaced by every change

A change writes new files beside the old, replaces the manifest, and then removes the files that
the manifest no longer names. So a reader sees the index before or after, and keeps what it has
opened.
"""

import fcntl
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from data.errors import UsageError
from data.files import bytes_digest, file_digest, load_array
from retrieval.detail import Detail, folder_name
from retrieval.index.manifest import (
    IndexManifest,
    SegmentEntry,
    read_index_manifest,
    write_index_manifest,
)
from retrieval.model_folder import copy_model

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel


def local_folder(name: str | Path) -> Path:
    """Raises `UsageError` for an index in Milvus, of which no folder is to be made."""
    if str(name).startswith("milvus:"):
        raise UsageError(
            f"{name} is no folder: build_in_milvus, add_to_milvus and delete_in_milvus of "
            "retrieval.milvus.write, or launch/index.py, change an index in Milvus"
        )
    return Path(name)


def index_file(folder: Path, patch_size: Detail, number: int) -> Path:
    """Where the vectors of segment `number` at `patch_size` lie."""
    name = f"image_{number:04d}.index" if number else "image.index"
    return folder / folder_name(patch_size) / name


def rows_file(folder: Path, number: int) -> Path:
    """Where the metadata of segment `number` lie."""
    return folder / "metadata" / f"metadata_{number:04d}.arrow"


def words_file(folder: Path, number: int) -> Path:
    """Where the words of segment `number` lie."""
    return folder / "words" / f"words_{number:04d}.sqlite"


def segment_files(folder: Path, number: int, patch_sizes: Iterable[Detail]) -> dict[str, Path]:
    """The files of segment `number`, as its entry in the manifest names them."""
    files = {folder_name(size): index_file(folder, size, number) for size in patch_sizes}
    return {"metadata": rows_file(folder, number), **files}


def tombstones_file(folder: Path, generation: int) -> Path:
    """Where the tombstones lie that change number `generation` wrote."""
    return folder / f"deleted_{generation:04d}.npy"


def read_tombstones(folder: Path, manifest: IndexManifest) -> Int[np.ndarray, " t"]:
    """The deleted ids, ascending. Raises `UsageError` for a damaged file, FileNotFoundError for one
    that is gone."""
    if not manifest.tombstones:
        return np.zeros(0, np.int64)
    file = folder / manifest.tombstones
    data = file.read_bytes()
    if bytes_digest(data) != manifest.tombstones_blake2b.get(file.name, bytes_digest(data)):
        raise UsageError(f"{file} is damaged; build the index again")
    try:
        ids: np.ndarray = load_array(io.BytesIO(data))
    except ValueError as error:
        raise UsageError(f"{file} is damaged; build the index again") from error
    if ids.dtype != np.int64 or ids.ndim != 1 or not (np.diff(ids) > 0).all():
        raise UsageError(f"{file} is damaged; build the index again")
    return ids


# ---- change --------------------------------------------------------------------------------


def check_new(out: Path) -> None:
    """Raises `UsageError` where something lies in the folder already."""
    held = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    if held:
        some = ", ".join(held[:3]) + (", ..." if held[3:] else "")
        raise UsageError(
            f"the folder {out} exists already and holds {some}; give another name, or remove that "
            "folder first"
        )


@contextmanager
def new_folder(out: Path, model: "Path | LitModel") -> Iterator[Path]:
    """A folder that gets its name when everything is in it."""
    check_new(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    copy_model(model, partial / "model")
    partial.rename(out)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with its process."""
    read_index_manifest(folder)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another program is changing {folder}; try again later") from error
        yield


def commit(
    folder: Path,
    manifest: IndexManifest,
    segments: Sequence[SegmentEntry],
    tombstones: Int[np.ndarray, " t"] | None = None,
) -> IndexManifest:
    """Make `segments`, less the ids of `tombstones`, the index; then remove what it left behind.

    manifest: of the state before. Returns the new one.
    """
    generation, num_deleted, name, digests = manifest.generation + 1, 0, "", {}
    if tombstones is not None and len(tombstones):
        file = tombstones_file(folder, generation)
        np.save(file, tombstones, allow_pickle=False)
        num_deleted, name, digests = len(tombstones), file.name, {file.name: file_digest(file)}
    manifest = replace(
        manifest,
        generation=generation,
        tombstones=name,
        tombstones_blake2b=digests,
        segments=tuple(segments),
        count=sum(entry.count for entry in segments) - num_deleted,
        next_segment=max([manifest.next_segment, *(entry.number + 1 for entry in segments)]),
        next_id=max([manifest.next_id, *(entry.last_id + 1 for entry in segments)]),
    )
    write_index_manifest(folder, manifest)
    _sweep(folder, manifest)
    return manifest


def _sweep(folder: Path, manifest: IndexManifest) -> None:
    """Remove files that the manifest does not name. Readers that have opened one keep it."""
    numbers = [entry.number for entry in manifest.segments]
    kept = {folder / manifest.tombstones} | {rows_file(folder, n) for n in numbers}
    kept |= {index_file(folder, size, n) for size in manifest.patch_sizes for n in numbers}
    kept |= {words_file(folder, n) for n in numbers}
    # Words last: who misses them misses other files too, and looks for a newer state.
    for pattern in (
        "patch_*/image*.index*", "tokens_*/image*.index*", "metadata/metadata_*.arrow*",
        "deleted_*.npy", "words/words_*.sqlite*",
    ):  # fmt: skip
        for file in folder.glob(pattern):
            if file not in kept:
                file.unlink(missing_ok=True)
