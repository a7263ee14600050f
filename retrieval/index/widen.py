"""One more patch size for an index that exists."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.errors import UsageError
from retrieval.index.build import write_base
from retrieval.index.config import Device
from retrieval.index.folder import commit, locked
from retrieval.index.integrity import check_index
from retrieval.index.manifest import read_index_manifest
from retrieval.index.segments import Segment, SurvivingRows
from retrieval.index.snapshot import Snapshot

VectorsOf = Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, "n d"]]
"""Of ids."""


def add_patch_size(
    folder: str | Path, patch_size: int, vectors_of: VectorsOf, device: Device = "auto"
) -> str:
    """Give every image of an index a vector at a further patch size, in one atomic step. Returns
    the reason for the index type.

    vectors_of: is asked for blocks of ids, perhaps twice. Additions and deletions are merged as by
    `compact_index`. Raises `UsageError` for a patch size that the index has, while another program
    changes it, and for a damaged file.
    """
    folder = Path(folder)
    with locked(folder):
        manifest = read_index_manifest(folder)
        if patch_size in manifest.patch_sizes:
            raise UsageError(f"patch_size {patch_size}: {folder} has it already")
        check_index(folder, manifest)  # damage is not to get a good digest
        snapshot = Snapshot.open(folder)
        sizes = tuple(sorted((*manifest.patch_sizes, patch_size), reverse=True))
        sources = [_Widened(segment, patch_size, vectors_of) for segment in snapshot.segments]
        wider = replace(snapshot.manifest, patch_sizes=sizes)
        wider, segments = write_base(folder, wider, sources, device, folder / "model")
        commit(folder, wider, segments)
    return wider.reason


class _Widened:
    """The rows of a segment that were not deleted, with vectors at one more patch size."""

    def __init__(self, segment: Segment, patch_size: int, vectors_of: VectorsOf) -> None:
        self._rows, self._ids = SurvivingRows(segment), segment.ids[segment.alive]
        self._patch_size, self._vectors_of = patch_size, vectors_of
        self.count = self._rows.count

    def vectors(self, patch_size: int, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        if patch_size == self._patch_size:
            return self._vectors_of(self._ids[start:stop])
        return self._rows.vectors(patch_size, start, stop)

    def metadata(self, start: int, stop: int) -> pa.Table:
        return self._rows.metadata(start, stop)
