"""The regions of an index, opened for search: the best part of each picture, or the whole."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from data.errors import UsageError
from data.files import write_json
from retrieval.detail import Detail
from retrieval.index.config import Device
from retrieval.index.filters import NamedFilter, Where, written
from retrieval.index.manifest import IndexManifest, read_index_manifest
from retrieval.index.snapshot import Snapshot
from retrieval.index_interface import IndexState
from retrieval.index_places import regions_folder
from retrieval.regions.boxes import WHOLE, Box

IMAGE, BOX = "image", Box._fields  # columns of their metadata
HOW = "`python launch/index.py --out {} --regions` makes them"


class FoundParts(NamedTuple):
    """What `Regions.nearest` finds, best first; ids are -1 where fewer than k match."""

    similarities: Float[np.ndarray, "q k"]
    ids: Int[np.ndarray, "q k"]
    """Of pictures, each once."""
    regions: Int[np.ndarray, "q k"]
    """Of their best regions, -1 for the whole."""


class Regions:
    """Those of one state of an index. Safe for threads."""

    def __init__(self, regions: Snapshot, images: IndexState) -> None:
        self._regions, self._images = regions, images

    @classmethod
    def open(cls, images: IndexState, device: Device = "cpu") -> "Regions | None":
        """None for an index that has none, or those of another image tower."""
        if regions_manifest(images.kept) is None:
            return None
        folder = regions_folder(images.kept)
        try:
            regions = Snapshot.open(folder, device)
        except UsageError as error:
            raise UsageError(f"{error}; or remove {folder}, which --regions makes again") from error
        same = regions.manifest.image_fingerprint == images.manifest.image_fingerprint
        return cls(regions, images) if same else None

    @property
    def patch_sizes(self) -> tuple[Detail, ...]:
        return self._regions.patch_sizes

    @property
    def manifest(self) -> IndexManifest:
        return self._regions.manifest

    def __len__(self) -> int:
        return len(self._regions)

    @cached_property
    def _of(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Ids of regions, ascending, and of their pictures."""
        if self._regions.columns is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return self._regions.ids(), self._regions.column_values(IMAGE).to_numpy()

    @cached_property
    def _pictures(self) -> tuple[int, int, int]:
        """Regions of one picture, at most; pictures that have some, of those the index holds and
        of those it holds no more."""
        images, counts = np.unique(self._of[1], return_counts=True)
        held = int(np.isin(images, self._images.ids()).sum())
        return int(counts.max(initial=0)), held, len(images) - held

    @cached_property
    def _missing(self) -> Int[np.ndarray, " n"]:
        """Pictures that have none."""
        return np.setdiff1d(self._images.ids(), self._of[1])

    @property
    def warning(self) -> str:
        """A sentence where pictures have no regions that may get some: they are new, or a run was
        stopped. Those whose files it could not read are its report's affair, unless none could be.
        Else ""."""
        missing, count = self._missing, len(self._images)
        if len(missing) < count:
            missing = np.setdiff1d(missing, read_unread(self._regions.folder))
        if not len(missing):
            return ""
        return (
            f"{len(missing):,} of {count:,} images have no parts in the index: found as a whole "
            "only"
        )

    def pictures(self, regions: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """Of each region the id of its picture; -1 of -1, or of one that is no more."""
        ids, images = self._of
        if not len(ids):
            return np.full(regions.shape, -1)
        places = np.searchsorted(ids, regions).clip(max=len(ids) - 1)
        return np.where(ids[places] == regions, images[places], -1)

    def _among(self, where: Where | None) -> Where | None:
        """A filter of pictures as one of their regions; None where all may be found."""
        if where is None and not self._pictures[2]:
            return None

        def wanted(regions: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
            return np.isin(self.pictures(regions), self._images.ids(where))

        if callable(where):
            return wanted
        return NamedFilter(f"pictures {written(where)}", wanted)

    def nearest(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
    ) -> FoundParts:
        """The k pictures that are most similar, as a whole or in their most similar region.

        Arguments as those of `IndexState.nearest`.
        """
        whole = self._images.nearest(queries, k, patch_size, where, nprobe, ef)
        depth = max(1, k * self._pictures[0])  # so many hold k pictures
        parts = self._regions.nearest(queries, depth, patch_size, self._among(where), nprobe, ef)
        similarities = np.concatenate([whole[0], parts[0]], axis=1)
        ids = np.concatenate([whole[1], self.pictures(parts[1])], axis=1)
        regions = np.concatenate([np.full_like(whole[1], -1), parts[1]], axis=1)
        lines = [_each_once(*line, k) for line in zip(similarities, ids, regions, strict=True)]
        return FoundParts(*(np.stack(part) for part in zip(*lines, strict=True)))

    def boxes(self, regions: Int[np.ndarray, " n"]) -> list[Box]:
        """Of each region; of -1 the whole picture."""
        boxes = [WHOLE] * len(regions)
        places = np.flatnonzero(regions >= 0)
        for place, row in zip(places, self._regions.rows(regions[places]), strict=True):
            boxes[place] = Box(*(row[name] for name in BOX))
        return boxes


def regions_manifest(kept: Path) -> IndexManifest | None:
    """Of the present regions of an index, None where there are none. kept: see `regions_folder`."""
    folder = regions_folder(kept)
    return read_index_manifest(folder) if (folder / "manifest.json").is_file() else None


def read_unread(regions: Path) -> Int[np.ndarray, " n"]:
    """Ids of the pictures whose files the last run could not read. regions: their folder."""
    file = _unread_file(regions)
    try:
        stat = file.stat()
    except OSError:
        return np.zeros(0, np.int64)
    return _read_unread(file, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=64)
def _read_unread(file: Path, modified: int, inode: int) -> Int[np.ndarray, " n"]:
    try:
        found = json.loads(file.read_text())["unread"].values()
        return np.array(sorted(id for ids in found for id in ids), np.int64)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return np.zeros(0, np.int64)  # the next run writes it anew


def write_unread(regions: Path, unread: Mapping[str, Sequence[int]]) -> None:
    """unread: by reason, the ids."""
    write_json(_unread_file(regions), {"format": 1, "unread": unread})


def _unread_file(regions: Path) -> Path:
    return regions / "unread.json"


def opened_regions(regions: Regions | None, place: object) -> Regions:
    """Raises `UsageError` where there are none."""
    if regions is None:
        raise UsageError(f"{place} has no regions; {HOW.format(place)}")
    return regions


def _each_once(
    similarities: Float[np.ndarray, " c"],
    ids: Int[np.ndarray, " c"],
    regions: Int[np.ndarray, " c"],
    k: int,
) -> Sequence[np.ndarray]:
    """The best of each picture, k of them; a whole picture before an equal part."""
    order = np.lexsort((regions, ids, -similarities))
    order = order[ids[order] >= 0]
    first = np.sort(np.unique(ids[order], return_index=True)[1])
    best = order[first][:k]
    missing = k - len(best)
    return (
        np.pad(similarities[best], (0, missing), constant_values=-np.inf),
        np.pad(ids[best], (0, missing), constant_values=-1),
        np.pad(regions[best], (0, missing), constant_values=-1),
    )
