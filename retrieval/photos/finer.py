"""Further patch sizes of an album, after the one by which it can be searched.

Vectors are gathered where a search coarse to fine keeps them (`FineVectors`), so such a search uses
them at once, and a run that was stopped goes on. When every photo has one, the index gets the patch
size.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.shards.location import ImageLocation
from retrieval.index.config import Device
from retrieval.index.snapshot import Snapshot
from retrieval.index.widen import add_patch_size
from retrieval.search.refine import MAX_KEPT, FineVectors

READ_TOGETHER = 128  # photos, between two reports of progress
AT_MOST = 4.0  # times the operations of the coarsest patch size


def usual_patch_sizes(model: LitModel) -> tuple[int, ...]:
    """The coarsest of a model, and the finest that costs at most `AT_MOST` times as much."""
    coarse = max(model.patch_sizes)
    most = AT_MOST * model.vision.gflops(coarse)
    fine = min(size for size in model.patch_sizes if model.vision.gflops(size) <= most)
    return tuple(dict.fromkeys((coarse, fine)))


def add_finer(
    out: Path,
    model: LitModel,
    patch_size: int,
    device: Device = "auto",
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[str]:
    """Give an index of photos a further patch size. Returns the photos that cannot be read, which
    keep it from that; none where it has the patch size now.

    on_progress: is told how many photos of how many have a vector.
    """
    snapshot = Snapshot.open(out)
    ids = snapshot.ids()
    fine = FineVectors(model, out / "fine.sqlite", max(MAX_KEPT, 2 * len(ids)))
    done, unread = 0, []
    for part in _parts(ids, READ_TOGETHER):
        locations = _locations(snapshot, part)
        found = fine.get(locations, patch_size)
        unread += [where.shard for id, where in locations.items() if id not in found]
        done += len(found)
        on_progress(done, len(ids))
    if unread:
        return unread

    def vectors_of(wanted: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        rows = np.empty((len(wanted), model.embed_dim), np.float32)
        for start in range(0, len(wanted), 4096):
            part = wanted[start : start + 4096].tolist()
            try:
                found = fine.get(_locations(snapshot, part), patch_size)
                rows[start : start + len(part)] = [found[id] for id in part]
            except KeyError:
                raise UsageError(f"{out} was changed meanwhile; start again") from None
        return rows

    add_patch_size(out, patch_size, vectors_of, device)
    fine.forget(patch_size)
    return []


def _parts(ids: Int[np.ndarray, " n"], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size].tolist()


def _locations(snapshot: Snapshot, ids: Sequence[int]) -> dict[int, ImageLocation]:
    return {row["id"]: ImageLocation.of(row) for row in snapshot.rows(ids)}
