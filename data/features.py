"""Cached image features on disk: what a locked tower said about every picture, once.

DIR/manifest.json names the tower, its width and the shards; per shard and patch size
SHARD.p28.npy holds (n, d) raw features in the shard's order, SHARD.keys.txt whose rows they are.
Every file appears whole or not at all, so a run that was stopped goes on where it was.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from data.errors import UsageError
from data.shards import is_local, load_index, load_summaries, shard_name, write_atomically

_FORMAT = 1
_MANIFEST = "manifest.json"
_KEEP_SHARDS = 128  # row tables and memory maps that stay open


def write_shard_features(
    dir: str | Path,
    shard_name: str,
    patch_size: int,
    keys: Sequence[str],
    features: Float[np.ndarray, "n d"],
) -> None:
    """The features of one shard's good samples, in the shard's order.

    Raises `UsageError` when the folder holds features of other samples of this shard.
    """
    if len(keys) != len(features):
        raise ValueError(f"{len(keys)} keys for {len(features)} rows of features")
    folder = Path(dir)
    text = "".join(f"{key}\n" for key in keys)
    keys_path = _keys_path(folder, shard_name)
    if keys_path.exists():
        if keys_path.read_bytes() != text.encode():
            raise UsageError(
                f"the feature cache {str(folder)!r} holds other samples of shard {shard_name!r} "
                "than were read now, delete the folder or name another"
            )
    else:
        write_atomically(keys_path, lambda file: file.write(text.encode()))
    path = _features_path(folder, shard_name, patch_size)
    write_atomically(path, lambda file: np.save(file, features, allow_pickle=False))


def write_manifest(
    dir: str | Path,
    image_fingerprint: str,
    width: int,
    shards: Sequence[str],
    index_dir: str = "",
) -> None:
    """Names what the folder's features are of. Written before them; more shards can be added.

    `image_fingerprint`: tower, transform and dtype, as the caller tells them. `width`: d.
    `shards`: paths. Raises `UsageError` where the folder already belongs to something else.
    """
    folder = Path(dir)
    entries = _describe(shards, index_dir)
    old = _read_manifest(folder)
    if old is not None:
        _compare(folder, old, image_fingerprint, entries)
        if old["width"] != width:
            raise UsageError(
                f"the feature cache {str(folder)!r} has width {old['width']}, the tower gives "
                f"{width}, name another folder"
            )
        entries = old["shards"] | entries
    manifest = {
        "format": _FORMAT,
        "image_fingerprint": image_fingerprint,
        "width": width,
        "shards": entries,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(folder / _MANIFEST, lambda file: file.write(text.encode()))


class FeatureCache:
    """Features by (shard, sample) number, read through memory maps."""

    def __init__(
        self,
        folder: Path,
        shards: Sequence[str],
        patch_sizes: Sequence[int],
        index_dir: str,
        width: int,
    ) -> None:
        """`width`: d, 0 while the folder is new. See `open`."""
        self._folder, self._shards, self._patch_sizes = folder, list(shards), tuple(patch_sizes)
        self._index_dir, self.width = index_dir, width
        self._rows = lru_cache(_KEEP_SHARDS)(self._read_rows)
        self._features = lru_cache(_KEEP_SHARDS * max(1, len(patch_sizes)))(self._map_features)

    @classmethod
    def open(
        cls,
        dir: str | Path,
        image_fingerprint: str,
        shards: Sequence[str],
        patch_sizes: Sequence[int],
        index_dir: str = "",
    ) -> "FeatureCache":
        """A cache for these shards (paths, in the pipeline's order), complete or not.

        Raises `UsageError` with a sentence that says what differs when the folder's features are
        of another tower, transform or state of a shard.
        """
        folder = Path(dir)
        manifest = _read_manifest(folder)
        entries = _describe(shards, index_dir)
        if manifest is not None:
            _compare(folder, manifest, image_fingerprint, entries)
        elif any(folder.glob("*.npy")):
            raise UsageError(f"{str(folder)!r} holds features but no {_MANIFEST}, name another")
        width = manifest["width"] if manifest else 0
        return cls(folder, shards, patch_sizes, index_dir, width)

    def missing(self) -> list[tuple[str, tuple[int, ...]]]:
        """(shard path, patch sizes) still to be computed."""
        found = []
        for shard in self._shards:
            name = shard_name(shard)
            absent = tuple(
                size
                for size in self._patch_sizes
                if not _features_path(self._folder, name, size).exists()
            )
            if absent:
                found.append((shard, absent))
        return found

    def num_missing_samples(self) -> int:
        """Samples of the shards whose image could not be read when the cache was filled."""
        summaries = load_summaries(self._shards, self._index_dir)
        lines = (
            _keys_path(self._folder, shard_name(shard)).read_bytes().count(b"\n")
            for shard in self._shards
        )
        return sum(summary.num_samples for summary in summaries) - sum(lines)

    def lookup(
        self,
        shards: Int[np.ndarray, " b"],
        indices: Int[np.ndarray, " b"],
        patch_size: int,
    ) -> tuple[Float[np.ndarray, "b d"], Bool[np.ndarray, " b"]]:
        """float32 features of samples, and which of them have any; rows of the others are zero.

        `shards`, `indices`: as in `Batch`. Raises `UsageError` for a patch size not computed and
        for files that do not fit one another.
        """
        parts = {int(shard): self._features(int(shard), patch_size) for shard in np.unique(shards)}
        width = self.width or next((part.shape[1] for part in parts.values()), 0)
        features = np.zeros((len(shards), width), dtype=np.float32)
        valid = np.zeros(len(shards), dtype=np.bool_)
        for shard, part in parts.items():
            places = np.flatnonzero(shards == shard)
            rows = self._rows(shard)[indices[places]]
            places, rows = places[rows >= 0], rows[rows >= 0]
            features[places] = part[rows]
            valid[places] = True
        return features, valid

    def _map_features(self, shard: int, patch_size: int) -> np.ndarray:
        """All features of a shard, as a memory map, one row per line of its keys file."""
        path = _features_path(self._folder, shard_name(self._shards[shard]), patch_size)
        try:
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UsageError(f"the feature cache has no {str(path)!r}, compute it first") from None
        except (ValueError, EOFError) as error:
            raise UsageError(f"{str(path)!r} is no array, delete it: {error}") from None
        rows = int(self._rows(shard).max(initial=-1)) + 1
        width = self.width or features.shape[-1]
        if features.ndim != 2 or features.shape[1] != width or len(features) != rows:
            raise UsageError(
                f"{str(path)!r} has shape {features.shape}, the cache's keys and manifest say "
                f"({rows}, {width}), delete it"
            )
        return features

    def _read_rows(self, shard: int) -> np.ndarray:
        """Row of every sample of the shard, -1 for those that were bad."""
        path = _keys_path(self._folder, shard_name(self._shards[shard]))
        lines = path.read_bytes().decode().split("\n")[:-1]
        row_of = {key: row for row, key in enumerate(lines)}
        keys = load_index(self._shards[shard], self._index_dir).keys
        rows = np.array([row_of.get(key, -1) for key in keys], dtype=np.int32)
        if int((rows >= 0).sum()) != len(lines):
            raise UsageError(f"{str(path)!r} names samples that its shard does not have, delete it")
        return rows


def _describe(shards: Sequence[str], index_dir: str) -> dict[str, dict[str, int]]:
    """What ties features to shards: name, size in bytes, number of samples."""
    by_name: dict[str, str] = {}
    for shard in shards:
        if not is_local(shard):
            raise UsageError(f"features are cached for local tars only, {shard!r} is a stream")
        if by_name.setdefault(shard_name(shard), shard) != shard:
            raise UsageError(
                f"shards {by_name[shard_name(shard)]!r} and {shard!r} have the same file name, "
                "which a feature cache cannot tell apart, rename one"
            )
    paths = list(by_name.values())
    summaries = load_summaries(paths, index_dir)
    return {
        name: {"size": os.path.getsize(path), "samples": summary.num_samples}
        for (name, path), summary in zip(by_name.items(), summaries, strict=True)
    }


def _compare(
    folder: Path, manifest: Mapping[str, Any], image_fingerprint: str, entries: Mapping[str, Any]
) -> None:
    cache = f"the feature cache {str(folder)!r}"
    if manifest["image_fingerprint"] != image_fingerprint:
        raise UsageError(
            f"{cache} was computed by {manifest['image_fingerprint']!r}, this run needs "
            f"{image_fingerprint!r}, name another folder"
        )
    for name, entry in entries.items():
        cached = manifest["shards"].get(name, entry)
        for what, unit in (("size", "bytes"), ("samples", "samples")):
            if cached[what] != entry[what]:
                raise UsageError(
                    f"{cache} was computed when shard {name!r} had {cached[what]} {unit}, it has "
                    f"{entry[what]} now, name another folder"
                )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}") from None
    names = {"image_fingerprint", "width", "shards"}
    if not isinstance(manifest, dict) or not names <= manifest.keys():
        raise UsageError(f"{str(path)!r} is no feature cache's manifest, name another folder")
    if manifest.get("format") != _FORMAT:
        raise UsageError(
            f"{str(path)!r} has format {manifest.get('format')!r}, allowed is {_FORMAT}"
        )
    return manifest


def _keys_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.keys.txt"


def _features_path(folder: Path, name: str, patch_size: int) -> Path:
    return folder / f"{name}.p{patch_size}.npy"
