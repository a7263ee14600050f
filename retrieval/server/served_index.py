"""An index that is served: its searcher under a name, and what it holds of single images."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from data.errors import UsageError
from data.shards.location import ImageLocation, read_image
from retrieval.detail import Detail
from retrieval.index.filters import Where
from retrieval.index.manifest import IndexManifest
from retrieval.index_interface import IndexState, IndexUnavailable
from retrieval.indexing_progress import IndexingProgress
from retrieval.search.calibration import calibration_file
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher
from retrieval.server.monitoring import Metrics
from retrieval.server.refusals import RequestError
from retrieval.server.thumbnails import Thumbnails

log = logging.getLogger(__name__)

MEAN_OF = 1000  # vectors
Read = TypeVar("Read")


class ServedIndex:
    """Metadata, vectors and thumbnails by id, read in threads; takes up changes of the folder."""

    def __init__(
        self, name: str, searcher: Searcher, pool: ThreadPoolExecutor, thumbnails: Thumbnails
    ) -> None:
        self.name, self.searcher = name, searcher
        self._pool, self._thumbnails = pool, thumbnails
        self._stamp = searcher.place.stamp()
        self.indexing: IndexingProgress | None = None  # of who adds to it while it is served
        self.damage = ""  # what is wrong with the index's files: it is not to be asked any more
        self._means: tuple[IndexManifest | None, dict[Detail, np.ndarray]] = None, {}
        self._intact: set[str] = set()  # digests of files that were read
        self._checking = threading.Lock()

    async def vector(self, id: int, patch_size: Detail) -> Float[np.ndarray, " d"]:
        """The unit-norm vector that the index holds of an image. Raises `RequestError`."""
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self._pool, self.searcher.vectors, [id], patch_size)
        except KeyError:
            raise RequestError(404, f"id: {id} is not in index {self.name}") from None
        return rows[0] / max(float(np.linalg.norm(rows[0])), 1e-12)

    async def rows(self, ids: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        """(id, metadata) of those ids that the index has."""
        snapshot = self.searcher.snapshot

        def look_up() -> list[tuple[int, dict[str, Any]]]:
            try:
                return list(zip(ids, snapshot.rows(ids), strict=True))
            except KeyError:
                return [pair for id in ids for pair in _row(snapshot, id)]

        return await asyncio.get_running_loop().run_in_executor(self._pool, look_up)

    async def small_jpegs(
        self, locations: Sequence[ImageLocation], side: int
    ) -> list[bytes | None]:
        """A small JPEG of each stored image, None for one that cannot be read."""
        found, missing = self._thumbnails.kept(locations, side)
        loop, get = asyncio.get_running_loop(), self._thumbnails.get
        made = [loop.run_in_executor(self._pool, get, locations[n], side) for n in missing]
        for number, jpeg in zip(missing, await asyncio.gather(*made), strict=True):
            found[number] = jpeg
        return found

    async def file(self, location: ImageLocation) -> bytes:
        """The file of a stored image. Raises as `read_image`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, read_image, location)

    async def ids(self, where: Where | None, most: int) -> tuple[Int[np.ndarray, " n"], int]:
        """The first `most` ids that a filter lets through, ascending, and how many it does."""
        return await self.of_snapshot(
            lambda snapshot: (snapshot.ids(where, most), snapshot.count_matching(where))
        )

    async def of_snapshot(self, read: Callable[[IndexState], Read]) -> Read:
        """What `read` finds in the index's present state, in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, read, self.searcher.snapshot)

    async def mean_vector(self, patch_size: Detail) -> Float[np.ndarray, " d"]:
        """Of a sample of the unit-norm vectors: its inner product with a query is how similar the
        query is to images at random. Zeros for an empty index."""
        manifest = self.searcher.snapshot.manifest
        if self._means[0] is not manifest:
            self._means = manifest, {}
        means = self._means[1]
        if patch_size not in means:
            means[patch_size] = await self.of_snapshot(partial(_mean_vector, patch_size=patch_size))
        return means[patch_size]

    async def confidence(
        self, vector: Float[np.ndarray, " d"], hits: Sequence[Hit], patch_size: Detail
    ) -> float | None:
        """`Searcher.confidence` of one text, None at once where nobody has calibrated the index."""
        if not calibration_file(self.searcher.folder).exists():
            return None
        ask = partial(self.searcher.confidence, vector[None], [hits], patch_size)
        (said,) = await asyncio.get_running_loop().run_in_executor(self._pool, ask)
        return said

    def check_files(self, metrics: Metrics) -> None:
        """Start to read the index's files whole, in a thread that nothing waits for."""
        threading.Thread(target=self._check, args=(metrics,), daemon=True).start()

    def _check(self, metrics: Metrics) -> None:
        with self._checking:
            manifest = self.searcher.snapshot.manifest
            try:
                self.searcher.place.check(manifest, self._intact)
            except IndexUnavailable as error:
                log.warning("%s is not checked: %s", self.name, error)
            except (UsageError, OSError) as error:
                self.damage = str(error)
                log.error("%s is not served any more: %s", self.name, error)
                metrics.reloads.labels(self.name, "damaged").inc()
            else:
                self.damage = ""

    async def reload(self, metrics: Metrics) -> None:
        """Pick up what was added to or deleted from the folder; a damaged one changes nothing."""
        stamp = self.searcher.place.stamp()
        if stamp == self._stamp:
            return
        try:
            loop = asyncio.get_running_loop()
            changed = await loop.run_in_executor(self._pool, _renewed, self.searcher)
        except Exception as error:  # a GPU without room among them; what is served goes on
            log.warning("%s stays as it is: %s", self.name, error)
            metrics.reloads.labels(self.name, "refused").inc()
        else:
            if changed:
                metrics.reloads.labels(self.name, "done").inc()
                metrics.index_images.labels(self.name).set(len(self.searcher))
                self.check_files(metrics)
        self._stamp = stamp


def _renewed(searcher: Searcher) -> bool:
    """Whether an index has changed; what its calibration needs of it is read here too."""
    changed = searcher.reload()
    _ = searcher.calibration
    return changed


def _mean_vector(snapshot: IndexState, patch_size: Detail) -> Float[np.ndarray, " d"]:
    drawn = snapshot.draw(MEAN_OF, seed=0)
    vectors = snapshot.vectors(drawn.tolist(), patch_size)
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray((vectors / norms).sum(axis=0) / max(len(drawn), 1), np.float32)


def _row(snapshot: IndexState, id: int) -> list[tuple[int, dict[str, Any]]]:
    try:
        return [(id, snapshot.rows([id])[0])]
    except KeyError:
        return []
