"""What an index that exists may be given: one more patch size, the words of its texts, a compaction
when it is due."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.errors import UsageError
from data.files import file_digest
from retrieval.detail import Detail, coarse_first, said
from retrieval.index.build import compact_index, write_base
from retrieval.index.config import Device
from retrieval.index.folder import commit, local_folder, locked, words_file
from retrieval.index.integrity import check_index
from retrieval.index.manifest import read_index_manifest
from retrieval.index.segments import Segment, SurvivingRows
from retrieval.index.snapshot import Snapshot
from retrieval.words.fill import write_words

COMPACT_ABOVE = 0.2  # share of an index that was added or deleted since the last compaction

VectorsOf = Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, "n d"]]
"""Of ids."""


def add_patch_size(
    folder: str | Path, patch_size: Detail, vectors_of: VectorsOf, device: Device = "auto"
) -> str:
    """Give every image of an index a vector at a further patch size, in one atomic step. Returns
    the reason for the index type.

    vectors_of: is asked for blocks of ids, perhaps twice. Additions and deletions are merged as by
    `compact_index`. Raises `UsageError` for a patch size that the index has, while another program
    changes it, for a damaged file, and for a patch size in an index of budgets.
    """
    folder = Path(folder)
    with locked(folder):
        manifest = read_index_manifest(folder)
        if patch_size in manifest.patch_sizes:
            raise UsageError(f"{said(patch_size)}: {folder} has it already")
        if isinstance(patch_size, int) != isinstance(manifest.patch_sizes[0], int):
            raise UsageError(
                f"{folder} holds {said(*manifest.patch_sizes)}: an index holds patch sizes or "
                f"budgets of tokens, so it takes no {said(patch_size)}"
            )
        check_index(folder, manifest)  # damage is not to get a good digest
        snapshot = Snapshot.open(folder)
        sizes = tuple(coarse_first((*manifest.patch_sizes, patch_size)))
        sources = [_Widened(segment, patch_size, vectors_of) for segment in snapshot.segments]
        wider = replace(snapshot.manifest, patch_sizes=sizes)
        wider, segments = write_base(folder, wider, sources, device, folder / "model")
        commit(folder, wider, segments)
    return wider.reason


def index_words(folder: str | Path) -> int:
    """Write the words of an index's texts where they are missing or damaged, in one atomic step.
    Returns for how many images.

    Raises `UsageError` while another program changes it, where nothing can be written, and for
    damaged metadata.
    """
    folder = local_folder(folder)
    with locked(folder):
        check_index(folder, read_index_manifest(folder))  # damage is not to get a good digest
        snapshot = Snapshot.open(folder)
        entries, count, changed = list(snapshot.manifest.segments), 0, False
        for number, segment in enumerate(snapshot.segments):
            file = words_file(folder, segment.number)
            noted = segment.entry.words
            if segment.words is None or file_digest(file) != noted["blake2b"]:
                written = write_words(file, segment.table)
                entries[number] = replace(segment.entry, words=written)
                count, changed = count + segment.num_alive, True
        if changed:
            commit(folder, snapshot.manifest, entries, snapshot.tombstones)
    return count


def compact_when_due(folder: Path, device: Device) -> str:
    """Compact when much was added or deleted since the last time. Returns why this index type."""
    manifest = Snapshot.open(folder).manifest
    base = sum(entry.count for entry in manifest.segments if not entry.delta)
    added = sum(entry.count for entry in manifest.segments if entry.delta)
    deleted = base + added - manifest.count
    if added + deleted > COMPACT_ABOVE * base:
        return compact_index(folder, device)
    return manifest.reason


class _Widened:
    """The rows of a segment that were not deleted, with vectors at one more patch size."""

    def __init__(self, segment: Segment, patch_size: Detail, vectors_of: VectorsOf) -> None:
        self._rows, self._ids = SurvivingRows(segment), segment.ids[segment.alive]
        self._patch_size, self._vectors_of = patch_size, vectors_of
        self.count = self._rows.count

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        if patch_size == self._patch_size:
            return self._vectors_of(self._ids[start:stop])
        return self._rows.vectors(patch_size, start, stop)

    def metadata(self, start: int, stop: int) -> pa.Table:
        return self._rows.metadata(start, stop)
