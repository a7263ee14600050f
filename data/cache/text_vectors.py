"""Cached vectors of captions on disk, of a text tower that does not change."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data.cache.checksums import IntactFiles
from data.shards.names import shard_name


class TextVectorCache:
    """DIR/SHARD.vectors.FINGERPRINT.npy: a row per caption, in the `CaptionCache`'s order."""

    def __init__(
        self, folder: str | Path, shards: Sequence[str], fingerprint: str, keep: int = 128
    ) -> None:
        """`shards`: paths of local tars, in the pipeline's order. `fingerprint`: of tokenizer and
        tower. `keep`: maps that stay open."""
        self._folder, self._shards, self._fingerprint = Path(folder), shards, fingerprint
        self.vectors = lru_cache(keep)(self._map_vectors)

    def missing(self, shard: int, captions: int) -> bool:
        """Whether a shard's file is absent, damaged, or of another number of captions than the
        shard has. Raises `UsageError` where the shard has changed since its captions were read."""
        files = IntactFiles(self._folder, self._shards[shard])
        files.check_shard()
        return not files.intact(self._name(shard)) or len(self._map_vectors(shard)) != captions

    def write(self, shard: int, vectors: Float[np.ndarray, "c w"]) -> None:
        """The vectors of all captions of a shard; raises `UsageError` as `IntactFiles.write`."""
        files = IntactFiles(self._folder, self._shards[shard])
        files.write(self._name(shard), partial(np.save, arr=vectors, allow_pickle=False))

    def _map_vectors(self, shard: int) -> Float[np.ndarray, "c w"]:
        return np.load(self._folder / self._name(shard), mmap_mode="r", allow_pickle=False)

    def _name(self, shard: int) -> str:
        return f"{shard_name(self._shards[shard])}.vectors.{self._fingerprint}.npy"
