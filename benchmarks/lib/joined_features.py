"""Many expressions of features from one pass: each is a choice of columns of a joined cache."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

from contrastive import distributed, load_vision_tower
from contrastive.image_features import fill_cache
from contrastive.vision.feature_terms import OWN
from contrastive.vision.select_features import select_features
from data.cache.checksums import IntactFiles
from data.cache.features import FeatureCache
from data.config import DataConfig
from data.shards.index import load_index
from data.shards.names import shard_name


class JoinedFeatures:
    """Features of several terms of a tower, by an image's key, kept on disk."""

    def __init__(self, folder: Path, tower: str, terms: Sequence[str]) -> None:
        """terms: those of all expressions, the own feature being `cls`."""
        self._folder, self._terms = folder, list(terms)
        self._base = load_vision_tower(tower, dtype=distributed.resolve_dtype("fastest"))
        self._joined = select_features(self._base, "+".join(terms))
        self._caches: dict[str, FeatureCache] = {}
        self._places: dict[str, tuple[str, int, int]] = {}  # key -> source, shard, sample

    def add(self, source: str, shards: Sequence[str], patch_sizes: Sequence[int]) -> None:
        """Compute what is not there yet. Keys are unique over all sources."""
        cfg = DataConfig(shards=tuple(shards), features=str(self._folder / "joined" / source))
        self._caches[source] = fill_cache(self._joined, cfg, patch_sizes)
        for number, shard in enumerate(shards):
            for row, key in enumerate(load_index(shard, "").keys):
                self._places[key] = (source, number, row)

    def columns(
        self, keys: Sequence[str], expression: str, patch_size: int
    ) -> Float[np.ndarray, "n f"]:
        """Features of images."""
        width = self._base.embed_dim
        chosen = ["cls"] if expression == OWN else expression.split("+")
        starts = [width * self._terms.index(term) for term in chosen]
        columns = np.concatenate([np.arange(start, start + width) for start in starts])
        out = np.empty((len(keys), len(columns)), np.float32)
        places = [self._places[key] for key in keys]
        for source in {source for source, _, _ in places}:
            rows = [i for i, place in enumerate(places) if place[0] == source]
            shards, samples = np.array([places[i][1:] for i in rows]).T
            found, valid = self._caches[source].lookup(shards, samples, patch_size)
            assert valid.all()
            out[rows] = found[:, columns]
        return out

    def cache(
        self, name: str, shards: Sequence[str], expression: str, patch_sizes: Sequence[int]
    ) -> str:
        """The folder of a cache of one expression for these shards, as training reads it."""
        tower = select_features(self._base, expression)
        folder = self._folder / "caches" / name / expression
        cache = FeatureCache(
            folder,
            tower.fingerprint,
            shards,
            patch_sizes,
            made_of=tower.made_of,
            max_pixels=DataConfig().max_pixels,
        )
        cache.claim(tower.embed_dim)
        for number, work in cache.missing():
            keys = load_index(shards[number], "").keys
            for size in work[0]:
                cache.write(number, size, 0, keys, self.columns(keys, expression, size))
        self._share_texts(folder, shards)
        return str(folder)

    def _share_texts(self, folder: Path, shards: Sequence[str]) -> None:
        """Captions and their vectors are the same for all expressions: copied, where they are."""
        for shard in shards:
            files = IntactFiles(folder, shard)
            for kind in ("texts", "vectors"):
                for made in folder.parents[1].glob(f"*/*/{shard_name(shard)}.{kind}.*"):
                    if not (folder / made.name).exists():
                        files.write(made.name, partial(_write_bytes, made))


def keys_of(shards: Sequence[str]) -> list[str]:
    """The images' keys, in the shards' order."""
    return [key for shard in shards for key in load_index(shard, "").keys]


def _write_bytes(source: Path, out: BinaryIO) -> None:
    out.write(source.read_bytes())
