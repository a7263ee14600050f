"""Coarse to fine: fine vectors of the candidates only, computed on demand and cached, and how they
rank together with the coarse ones.

Computed vectors are kept in a small SQLite file for later searches, threads and programs, each with
a checksum behind it; what is damaged is computed again, as are vectors by 0.1.0, which had none.
"""

import sqlite3
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.batch import Pixels, batch_pixels
from data.config import MAX_PIXELS
from data.errors import UsageError
from data.problems import BadSample
from data.shards.location import ImageLocation, read_images
from data.transform import Cuts
from retrieval.detail import Detail, as_key
from retrieval.embed.encode import embed_pixels, reader_cuts

MAX_KEPT = 1_000_000  # vectors, of all patch sizes: 1.5 GB at width 384
BATCH = 32  # images per forward
_READERS = 4  # threads that read and decode


COARSE_SHARE = 1 / 3  # weight of the coarse similarity in a refined one


def blend(fine: Any, coarse: Any) -> Any:
    """Blend: 2/3 fine + 1/3 coarse, on similarities or on vectors with that dot product.

    It ranks better than the fine similarities alone (benchmarks/coarse_to_fine.py), and the coarse
    ones are already computed.
    """
    return (1 - COARSE_SHARE) * fine + COARSE_SHARE * coarse


def rank_again(
    queries: Float[np.ndarray, "q d"],
    similarities: Float[np.ndarray, "q c"],
    ids: Int[np.ndarray, "q c"],
    vectors: Mapping[int, Float[np.ndarray, " d"]],
) -> tuple[Float[np.ndarray, "q c"], Int[np.ndarray, "q c"]]:
    """Candidates by both similarities (`blend`), best first. Those without a fine vector come last,
    by their coarse similarity. queries: as the fine vectors see them."""
    similarities, ids = similarities.copy(), ids.copy()
    for query, line, found in zip(queries, similarities, ids, strict=True):
        count = int((found >= 0).sum())
        known = np.array([id in vectors for id in found[:count].tolist()], bool)
        if known.any():
            rows = np.stack([vectors[id] for id in found[:count][known].tolist()])
            line[:count][known] = blend(rows @ query, line[:count][known])
        order = np.lexsort((found[:count], -line[:count], ~known))
        line[:count], found[:count] = line[:count][order], found[:count][order]
    return similarities, ids


class FineVectors:
    """Vectors by (patch size, id), computed from the images' files when they are not there.

    Safe for threads: what several ask for at once is computed once.
    """

    def __init__(self, model: LitModel, file: Path | None, max_kept: int = MAX_KEPT) -> None:
        """file: of the cache, None for memory alone; where it cannot be written, memory too."""
        self._model, self._max_kept = model, max_kept
        self._width = model.embed_dim
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._file = file
        self._opened: sqlite3.Connection | None = None  # most searches need none
        self._inode: int | None = None  # of the file that is open
        self.num_encoded = 0  # images, since this object was made

    def get(
        self, locations: Mapping[int, ImageLocation], patch_size: Detail
    ) -> dict[int, Float[np.ndarray, " d"]]:
        """id -> unit-norm vector; ids whose image cannot be read are missing."""
        found = self._look_up([*locations], patch_size)
        if len(found) < len(locations):
            with self._encoding:
                found |= self._look_up([id for id in locations if id not in found], patch_size)
                missing = {id: where for id, where in locations.items() if id not in found}
                computed = self._encode(missing, patch_size)
                self._keep(computed, patch_size)
                found |= computed
        return found

    def forget(self, patch_size: Detail) -> None:
        """Keep no vectors of a patch size: the index has them now."""
        with self._lock, suppress(sqlite3.DatabaseError):
            self._database.execute("DELETE FROM fine WHERE patch_size = ?", (as_key(patch_size),))
            self._database.commit()

    def _encode(
        self, locations: Mapping[int, ImageLocation], patch_size: Detail
    ) -> dict[int, Float[np.ndarray, " d"]]:
        ordered = sorted(locations.items(), key=lambda item: item[1][:2])
        computed: dict[int, np.ndarray] = {}
        cuts = reader_cuts(self._model, [patch_size])
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(ordered), BATCH):
                part = ordered[start : start + BATCH]
                files = read_images(location for _, location in part)
                pixels = list(pool.map(partial(self._pixels, cuts=cuts), files))
                good = [(id, p) for (id, _), p in zip(part, pixels, strict=True) if p is not None]
                if good:
                    together = batch_pixels([p for _, p in good])
                    rows = embed_pixels(self._model, together, [patch_size])[patch_size]
                    computed |= {id: row for (id, _), row in zip(good, rows, strict=True)}
        self.num_encoded += len(computed)
        return computed

    def _pixels(self, data: bytes | None, cuts: Cuts | None) -> Pixels | None:
        transform = self._model.transform
        try:
            if data is None:
                return None
            return transform.pixels(transform.decode(data, MAX_PIXELS), cuts)
        except BadSample:
            return None

    # ---- the cache -------------------------------------------------------------------------

    @property
    def _database(self) -> sqlite3.Connection:
        """Call with the lock held. Opened again where the file was removed, as with the folder of
        an index that is built anew: ids are other images there."""
        if self._opened is None or self._inode != _inode(self._file):
            self._opened = _open(self._file, self._model.image_fingerprint)
            self._inode = _inode(self._file)
            weakref.finalize(self, self._opened.close)
        return self._opened

    def _look_up(self, ids: Sequence[int], patch_size: Detail) -> dict[int, np.ndarray]:
        found = {}
        with self._lock:
            for start in range(0, len(ids), 500):
                part = ids[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT id, vector FROM fine WHERE patch_size = ? AND id IN ({marks})"
                try:
                    rows = self._database.execute(query, (as_key(patch_size), *part)).fetchall()
                except sqlite3.DatabaseError:  # damaged
                    return {}
                for id, blob in rows:
                    if blob == _checked(patch_size, id, blob[:-4]):
                        found[id] = np.frombuffer(blob[:-4], np.float32)
        return {id: vector for id, vector in found.items() if len(vector) == self._width}

    def _keep(self, vectors: Mapping[int, np.ndarray], patch_size: Detail) -> None:
        """Add vectors, and forget the oldest above the limit."""
        rows = [
            (as_key(patch_size), id, _checked(patch_size, id, vector.astype(np.float32).tobytes()))
            for id, vector in vectors.items()
        ]
        # a full disk, or a damaged file, costs only the cache
        with self._lock, suppress(sqlite3.DatabaseError):
            self._database.executemany("INSERT OR REPLACE INTO fine VALUES (?, ?, ?)", rows)
            newest = "SELECT max(rowid) - ? FROM fine"
            self._database.execute(f"DELETE FROM fine WHERE rowid <= ({newest})", (self._max_kept,))
            self._database.commit()


def _checked(patch_size: Detail, id: int, vector: bytes) -> bytes:
    return vector + zlib.crc32(vector, zlib.crc32(f"{as_key(patch_size)} {id}".encode())).to_bytes(
        4, "big"
    )


def _inode(file: Path | None) -> int | None:
    with suppress(OSError):
        return None if file is None else file.stat().st_ino
    return None


def _open(file: Path | None, image_fingerprint: str) -> sqlite3.Connection:
    """The cache of this image tower; a damaged one, or another tower's, is begun anew."""
    for _ in range(3):
        try:
            name = ":memory:" if file is None else str(file)
            database = sqlite3.connect(name, timeout=10, check_same_thread=False)
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE IF NOT EXISTS of (image_fingerprint TEXT)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS fine (patch_size INTEGER, id INTEGER, vector BLOB, "
                "UNIQUE (patch_size, id))"
            )
            row = database.execute("SELECT image_fingerprint FROM of").fetchone()
            if row != (image_fingerprint,):
                database.execute("DELETE FROM fine")
                database.execute("DELETE FROM of")
                database.execute("INSERT INTO of VALUES (?)", (image_fingerprint,))
            database.commit()
            return database
        except sqlite3.DatabaseError as error:
            readable = not isinstance(error, sqlite3.OperationalError)
            if file is not None and readable:  # damaged
                with suppress(OSError):
                    file.unlink()
            else:
                file = None
    raise UsageError("no cache of fine vectors can be opened, not even in memory")
