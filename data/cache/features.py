"""Cached image features on disk: a locked tower sees every image once.

DIR/manifest.json names the tower, its width, the shards and how augmented views are made. Per shard
and patch size, SHARD.p28.npy holds (n, d) raw features in the shard's order, SHARD.p28.view1.npy
those of an augmented view; SHARD.keys.txt has the keys of the rows. Files appear whole or not at
all and have checksums: a run that was stopped continues, and a damaged file is computed again.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from data.cache.checksums import IntactFiles
from data.cache.manifest import Manifest
from data.errors import UsageError
from data.files import load_array
from data.shards.index import load_index, load_summaries
from data.shards.names import check_told_apart, shard_name

_KEEP_SHARDS = 128  # whose memory maps stay open
_KEEP_ROWS = 4096  # shards whose row tables stay in memory: of 10,000 samples each, 160 MB in all

Work = dict[int, tuple[int, ...]]
"""View -> patch sizes."""


class FeatureCache:
    """Features by (shard, sample) number, read through memory maps."""

    def __init__(
        self,
        dir: str | Path,
        image_fingerprint: str,
        shards: Sequence[str],
        patch_sizes: Sequence[int],
        *,
        views: int = 1,
        augment_fingerprint: str = "",
        made_of: Mapping[str, str] | None = None,
        max_pixels: int = 0,
        index_dir: str = "",
    ) -> None:
        """A cache for these shards (paths, in the pipeline's order), complete or not.

        image_fingerprint: of tower, transform and dtype. views: the plain one and augmented ones;
        augment_fingerprint: how those are made. made_of: what image_fingerprint hashes, by name,
        the most telling first. max_pixels: larger images were not decoded.
        Raises `UsageError` that says what differs when the folder's features are of another tower,
        transform, augmentation or state of a shard.
        """
        self.folder, self._shards = Path(dir), list(shards)
        self._patch_sizes, self._views, self._index_dir = tuple(patch_sizes), views, index_dir
        augment = augment_fingerprint if views > 1 else ""
        described = _describe(shards, index_dir)
        self._wanted = Manifest(image_fingerprint, described, augment, 0, made_of or {}, max_pixels)
        found = Manifest.read(self.folder)
        if found is not None:
            found.check(self.folder, self._wanted)
        elif any(self.folder.glob("*.npy")):
            raise UsageError(f"{str(self.folder)!r} holds features but no manifest, name another")
        self.width = found.width if found else 0  # d, 0 while the folder is new
        self._rows = lru_cache(_KEEP_ROWS)(self._read_rows)
        maps = _KEEP_SHARDS * max(1, len(patch_sizes)) * views
        self._features = lru_cache(maps)(self._map_features)

    # ---- fill ------------------------------------------------------------------------------

    def claim(self, width: int) -> None:
        """Write the manifest, before any feature; the shards of earlier calls stay in it.

        width: d. Raises `UsageError` where the folder already has another.
        """
        if self.width and self.width != width:
            raise UsageError(
                f"the feature cache {str(self.folder)!r} has width {self.width}, the tower gives "
                f"{width}, name another folder"
            )
        self.width = width
        self._wanted.write(self.folder, width)

    def missing(self, shards: Sequence[int] | None = None) -> list[tuple[int, Work]]:
        """(shard number, what is still to be computed), damaged files included.

        shards: numbers; all when not given. Raises `UsageError` where a shard has changed since its
        features were computed.
        """
        found = []
        for shard in range(len(self._shards)) if shards is None else shards:
            name = shard_name(self._shards[shard])
            files = IntactFiles(self.folder, self._shards[shard])
            files.check_shard()
            known = files.intact(f"{name}.keys.txt")
            work = {}
            for view in range(self._views):
                absent = tuple(
                    size
                    for size in self._patch_sizes
                    if not (known and files.intact(_file_name(name, size, view)))
                )
                if absent:
                    work[view] = absent
            if work:
                found.append((shard, work))
        return found

    def write(
        self,
        shard: int,
        patch_size: int,
        view: int,
        keys: Sequence[str],
        features: Float[np.ndarray, "n d"],
    ) -> None:
        """The features of one shard's good samples, in the shard's order.

        Raises `UsageError` when the folder holds features of other samples of this shard, and
        where the disk does not take them.
        """
        if len(keys) != len(features):
            raise ValueError(f"{len(keys)} keys for {len(features)} rows of features")
        name = shard_name(self._shards[shard])
        files = IntactFiles(self.folder, self._shards[shard])
        text = "".join(f"{key}\n" for key in keys).encode()
        if not files.intact(f"{name}.keys.txt"):
            files.write(f"{name}.keys.txt", lambda file: file.write(text))
        elif (self.folder / f"{name}.keys.txt").read_bytes() != text:
            raise UsageError(
                f"the feature cache {str(self.folder)!r} holds other samples of shard {name!r} "
                "than were read now, delete the folder or name another"
            )
        files.write(
            _file_name(name, patch_size, view),
            lambda file: np.save(file, features, allow_pickle=False),
        )

    # ---- use -------------------------------------------------------------------------------

    def num_missing_samples(self) -> int:
        """Samples of the shards whose image could not be read when the cache was filled."""
        summaries = load_summaries(self._shards, self._index_dir)
        lines = (self._keys(shard).count(b"\n") for shard in range(len(self._shards)))
        return sum(summary.num_samples for summary in summaries) - sum(lines)

    def lookup(
        self,
        shards: Int[np.ndarray, " b"],
        indices: Int[np.ndarray, " b"],
        patch_size: int,
        views: Int[np.ndarray, " b"] | None = None,
    ) -> tuple[Float[np.ndarray, "b d"], Bool[np.ndarray, " b"]]:
        """float32 features of samples, and which of them have any; rows of the others are zero.

        `shards`, `indices`, `views`: as in `Batch`; no views: the plain one. Raises `UsageError`
        for a patch size not computed and for files that do not fit one another.
        """
        views = np.zeros_like(shards) if views is None else views
        features = np.empty((len(shards), self.width), dtype=np.float32)
        valid = np.empty(len(shards), dtype=np.bool_)
        by_file = np.lexsort((indices, views, shards))  # each is read once, forward
        for low, high in pairwise(runs(shards[by_file], views[by_file])):
            places = by_file[low:high]
            shard, view = int(shards[places[0]]), int(views[places[0]])
            rows = self._rows(shard)[indices[places]]
            known = valid[places] = rows >= 0
            if known.any():
                features[places] = self._features(shard, patch_size, view)[rows]
        features[~valid] = 0
        return features, valid

    def _map_features(self, shard: int, patch_size: int, view: int) -> np.ndarray:
        """All features of a shard, as a memory map, one row per line of its keys file."""
        path = self.folder / _file_name(shard_name(self._shards[shard]), patch_size, view)
        try:
            features: np.ndarray = load_array(path, mapped=True)
        except FileNotFoundError:
            raise UsageError(f"the feature cache has no {str(path)!r}, compute it first") from None
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is no array, delete it: {error}") from None
        rows = int(self._rows(shard).max(initial=-1)) + 1
        if features.shape != (rows, self.width):
            raise UsageError(
                f"{str(path)!r} has shape {features.shape}, the cache's keys and manifest say "
                f"({rows}, {self.width}), delete it"
            )
        return features

    def _read_rows(self, shard: int) -> np.ndarray:
        """Row of every sample of the shard, -1 for those that were bad."""
        lines = self._keys(shard).decode().split("\n")[:-1]
        row_of = {key: row for row, key in enumerate(lines)}
        keys = load_index(self._shards[shard], self._index_dir).keys
        rows = np.array([row_of.get(key, -1) for key in keys], dtype=np.int32)
        if int((rows >= 0).sum()) != len(lines):
            raise UsageError(
                f"the feature cache {str(self.folder)!r} names samples that shard "
                f"{self._shards[shard]!r} does not have, delete the folder or name another"
            )
        return rows

    def _keys(self, shard: int) -> bytes:
        return (self.folder / f"{shard_name(self._shards[shard])}.keys.txt").read_bytes()


def runs(*columns: Int[np.ndarray, " b"]) -> list[int]:
    """Where rows begin that differ from the one before, and the end; there is one row at least."""
    differs = np.any([np.diff(column) != 0 for column in columns], axis=0)
    return [0, *(np.flatnonzero(differs) + 1).tolist(), len(columns[0])]


def _file_name(shard: str, patch_size: int, view: int) -> str:
    return f"{shard}.p{patch_size}.view{view}.npy" if view else f"{shard}.p{patch_size}.npy"


def _describe(shards: Sequence[str], index_dir: str) -> dict[str, dict[str, int]]:
    """What ties features to shards: name, size in bytes, number of samples."""
    check_told_apart(shards)
    paths = list(dict.fromkeys(shards))
    summaries = load_summaries(paths, index_dir)
    return {
        shard_name(path): {"size": os.path.getsize(path), "samples": summary.num_samples}
        for path, summary in zip(paths, summaries, strict=True)
    }
