"""Indexes, their models, and the queues before them: what every endpoint calls."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.class_names import fill_template
from data.shards.location import ImageLocation
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search.config import MAX_K
from retrieval.search.searcher import Hit, Searcher
from retrieval.server.batching import Batcher
from retrieval.server.limits import Limits, RequestError
from retrieval.server.monitoring import Metrics
from retrieval.server.thumbnails import Thumbnails, decode_upload

DUPLICATE = 0.94  # cosine from which on two hits are one, as in clip-retrieval
KEPT_LABELS = 20_000
WATCH_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeKey:
    """Queries that can share a forward."""

    what: Literal["text", "image"]
    model: int
    patch_size: int = 0


@dataclass(frozen=True)
class Encoded:
    """A unit-norm vector, and the milliseconds of the forward that it came from."""

    vector: Float[np.ndarray, " d"]
    ms: float


@dataclass(frozen=True)
class SearchKey:
    """Searches that can share a pass over the index."""

    index: str
    patch_size: int
    k: int
    where: str = ""  # JSON
    deduplicate: bool = False
    nprobe: int | None = None
    ef: int | None = None
    refine_patch_size: int | None = None
    candidates: int = 0


class Service:
    """Answers queries of many requests at once. Made before the event loop, closed after it."""

    def __init__(
        self,
        searchers: Mapping[str, Searcher],
        class_sets: Mapping[str, ZeroShotClassifier],
        limits: Limits,
        metrics: Metrics,
        image_urls: bool = False,
    ) -> None:
        """searchers: by the index's name, at least one. class_sets: made by the first one's model.
        image_urls: whether a request's image_url is fetched."""
        self.searchers, self.class_sets = dict(searchers), dict(class_sets)
        self.limits, self.metrics, self.image_urls = limits, metrics, image_urls
        self.ready = False  # set while the application runs
        self.num_in_flight = 0  # requests, kept by the guard
        self.thumbnails = Thumbnails()
        self.pool = ThreadPoolExecutor(4, "pictures")  # decode, resize, read metadata
        self.fetch_pool = ThreadPoolExecutor(4, "fetch")
        self._models: list[LitModel] = []
        for searcher in self.searchers.values():
            if all(model is not searcher.model for model in self._models):
                self._models.append(searcher.model)
        self._labels: OrderedDict[tuple[int, str, tuple[str, ...]], np.ndarray] = OrderedDict()
        self._stamps = {name: _stamp(s) for name, s in self.searchers.items()}
        self.encoding = self._batcher("encode", self._encode, 64)
        self.searching = self._batcher("search", self._search, 64)
        self.refining = self._batcher("refine", self._search, 8)
        for name, searcher in self.searchers.items():
            metrics.index_images.labels(name).set(len(searcher))

    def _batcher(self, name: str, run: Any, max_batch: int) -> Batcher:
        return Batcher(
            run,
            max_batch,
            self.limits.max_queue,
            num_expected=lambda: self.num_in_flight,
            observe=self.metrics.batch_size.labels(name).observe,
        )

    def close(self) -> None:
        """End all threads."""
        for batcher in (self.encoding, self.searching, self.refining):
            batcher.close()
        for pool in (self.pool, self.fetch_pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def searcher(self, name: str | None, field: str = "index") -> tuple[str, Searcher]:
        """(name, searcher); the first when no name is given."""
        if name is None:
            return next(iter(self.searchers.items()))
        if name not in self.searchers:
            allowed = ", ".join(self.searchers)
            raise RequestError(404, f"{field}: no index {name[:80]!r}; allowed: {allowed}")
        return name, self.searchers[name]

    # ---- encode ----------------------------------------------------------------------------

    async def encode_text(self, model: LitModel, texts: Sequence[str]) -> list[Encoded]:
        """One vector per text; concurrent requests share forwards."""
        return await self.encoding.submit(EncodeKey("text", self._number(model)), texts)

    async def prepare(self, model: LitModel, data: bytes, field: str) -> torch.Tensor:
        """The pixels of an image file as the model takes them; else blames `field`."""

        def decode() -> torch.Tensor:
            with self.metrics.timed("image_prepro_time"):
                return model.transform(decode_upload(data, self.limits.max_pixels, field))

        return await asyncio.get_running_loop().run_in_executor(self.pool, decode)

    async def encode_image(self, model: LitModel, pixels: torch.Tensor, size: int) -> Encoded:
        """One vector of prepared pixels at a patch size that the model offers."""
        key = EncodeKey("image", self._number(model), size)
        return (await self.encoding.submit(key, [pixels]))[0]

    async def embed_labels(
        self, model: LitModel, labels: Sequence[str], templates: Sequence[str]
    ) -> Float[np.ndarray, "c d"]:
        """One vector per label, as `classify.embed_classes`; those met before are kept."""
        number, frame = self._number(model), tuple(templates)
        found = {label: self._labels.get((number, label, frame)) for label in labels}
        new = [label for label, vector in found.items() if vector is None]
        if new:
            prompts = [fill_template(template, label) for label in new for template in frame]
            encoded = await self.encode_text(model, prompts)
            embeds = np.stack([one.vector for one in encoded])
            means = embeds.reshape(len(new), len(frame), -1).mean(axis=1)
            for label, row in zip(new, means, strict=True):
                unit = row / max(float(np.linalg.norm(row)), 1e-12)
                found[label] = self._labels[number, label, frame] = unit
        while len(self._labels) > KEPT_LABELS:
            self._labels.popitem(last=False)
        return np.stack([row for label in labels if (row := found[label]) is not None])

    def _number(self, model: LitModel) -> int:
        return next(n for n, other in enumerate(self._models) if other is model)

    def _encode(self, key: EncodeKey, items: list[Any]) -> list[Encoded]:
        model = self._models[key.model]
        step = f"{key.what}_clip_inference_time"
        with self.metrics.timed(step) as clock:
            if key.what == "text":
                rows = model.encode_text(items)
            else:
                rows = model.encode_image(torch.stack(items), patch_size=key.patch_size)
            vectors = rows.float().cpu().numpy()
        return [Encoded(vector, clock.ms) for vector in vectors]

    # ---- search ----------------------------------------------------------------------------

    async def search(
        self,
        key: SearchKey,
        vector: Float[np.ndarray, " d"],
        fine: Float[np.ndarray, " d"] | None = None,
    ) -> list[Hit]:
        """Hits, best first, of one unit-norm vector. fine: as the refinement sees the query."""
        queue = self.searching if key.refine_patch_size is None else self.refining
        return (await queue.submit(key, [(vector, vector if fine is None else fine)]))[0]

    def _search(self, key: SearchKey, items: list[Any]) -> list[list[Hit]]:
        searcher = self.searchers[key.index]
        vectors, fine = (np.stack(part) for part in zip(*items, strict=True))
        step = "knn_index_time" if key.refine_patch_size is None else "refine_time"
        with self.metrics.timed(step):
            if not key.deduplicate:
                return self._nearest(searcher, key, vectors, fine, key.k)
            most = key.candidates or MAX_K
            depth = min(2 * key.k + 20, most)
            while True:  # until there are k, however many are like others
                found = self._nearest(searcher, key, vectors, fine, depth)
                kept = _without_duplicates(searcher, found, key.patch_size)
                rows = zip(found, kept, strict=True)
                if depth == most or all(len(a) < depth or len(b) >= key.k for a, b in rows):
                    return [row[: key.k] for row in kept]
                depth = min(2 * depth, most)

    def _nearest(
        self, searcher: Searcher, key: SearchKey, vectors: Any, fine: Any, k: int
    ) -> list[list[Hit]]:
        return searcher.search_embeds(
            vectors, k, key.patch_size,
            refine_patch_size=key.refine_patch_size, refine_embeds=fine,
            candidates=key.candidates, where=json.loads(key.where) if key.where else None,
            nprobe=key.nprobe, ef=key.ef,
        )  # fmt: skip

    async def vector_of(self, name: str, id: int, patch_size: int) -> Float[np.ndarray, " d"]:
        """What the index holds of one image."""
        searcher = self.searchers[name]
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self.pool, searcher.vectors, [id], patch_size)
        except KeyError:
            raise RequestError(404, f"id: {id} is not in index {name}") from None
        return rows[0] / max(float(np.linalg.norm(rows[0])), 1e-12)

    async def rows_of(self, name: str, ids: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        """(id, metadata) of those ids that are there."""
        snapshot = self.searchers[name].snapshot

        def look_up() -> list[tuple[int, dict[str, Any]]]:
            try:
                return list(zip(ids, snapshot.rows(ids), strict=True))
            except KeyError:
                return [pair for id in ids for pair in _row(snapshot, id)]

        return await asyncio.get_running_loop().run_in_executor(self.pool, look_up)

    async def small_jpegs(
        self, locations: Sequence[ImageLocation], side: int
    ) -> list[bytes | None]:
        """A small JPEG of each stored image, None for one that cannot be read."""
        found, missing = self.thumbnails.kept(locations, side)
        loop, get = asyncio.get_running_loop(), self.thumbnails.get
        made = [loop.run_in_executor(self.pool, get, locations[n], side) for n in missing]
        for number, jpeg in zip(missing, await asyncio.gather(*made), strict=True):
            found[number] = jpeg
        return found

    # ---- changes ---------------------------------------------------------------------------

    async def watch(self) -> None:
        """Take up changes of the index folders, for ever. Searches go on meanwhile."""
        while True:
            await asyncio.sleep(WATCH_S)
            for name in self.searchers:
                await self.reload(name)

    async def reload(self, name: str) -> None:
        """Take up what was added to or deleted from an index; a damaged one is left as it was."""
        searcher = self.searchers[name]
        stamp = _stamp(searcher)
        if stamp == self._stamps[name]:
            return
        try:
            loop = asyncio.get_running_loop()
            changed = await loop.run_in_executor(self.pool, searcher.reload)
        except Exception as error:  # a GPU without room among them; what is served goes on
            log.warning("%s stays as it is: %s", name, error)
            self.metrics.reloads.labels(name, "refused").inc()
        else:
            if changed:
                self.metrics.reloads.labels(name, "done").inc()
                self.metrics.index_images.labels(name).set(len(searcher))
        self._stamps[name] = stamp


def _stamp(searcher: Searcher) -> tuple[int, ...]:
    """Changes whenever the manifest is replaced."""
    try:
        stat = Path(searcher.folder, "manifest.json").stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _row(snapshot: Any, id: int) -> list[tuple[int, dict[str, Any]]]:
    try:
        return [(id, snapshot.rows([id])[0])]
    except KeyError:
        return []


def _without_duplicates(
    searcher: Searcher, found: list[list[Hit]], patch_size: int
) -> list[list[Hit]]:
    """Less the hits that are like better ones, and those that are gone since they were found."""
    snapshot = searcher.snapshot
    ids = [hit.id for row in found for hit in row]
    try:
        vectors = snapshot.vectors(ids, patch_size)
    except KeyError:  # it is a later one than was searched
        there = set(snapshot.ids().tolist())
        found = [[hit for hit in row if hit.id in there] for row in found]
        vectors = snapshot.vectors([hit.id for row in found for hit in row], patch_size)
    kept, start = [], 0
    for row in found:
        own = vectors[start : start + len(row)]
        kept.append([row[n] for n in distinct(own)])
        start += len(row)
    return kept


def distinct(
    vectors: Float[np.ndarray, "n d"], threshold: float = DUPLICATE
) -> Int[np.ndarray, " m"]:
    """Those that are not like any before them, in order: what more vectors follow changes nothing,
    so that pages join."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-12)
    alike = np.tril(unit @ unit.T >= threshold, -1)
    return np.flatnonzero(~alike.any(axis=1))
