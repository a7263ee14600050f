"""What a server is made of: indexes, class sets, and the queues before models and indexes."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from contrastive.model.lit import LitModel
from retrieval.detail import Detail
from retrieval.evaluation.calibration_error import read_temperatures
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search.config import REFUSE
from retrieval.search.searcher import Searcher
from retrieval.server.config import Limits
from retrieval.server.label_cache import LabelCache
from retrieval.server.monitoring import Metrics
from retrieval.server.queues.batching import Batcher
from retrieval.server.queues.encoding import Encoder
from retrieval.server.queues.searching import SearchQueue
from retrieval.server.refusals import RequestError
from retrieval.server.served_index import ServedIndex
from retrieval.server.thumbnails import Thumbnails
from retrieval.server.uploads import Uploads

WATCH_S = 1.0


class Service:
    """The parts that the endpoints use. Made before the event loop, closed after it."""

    def __init__(
        self,
        searchers: Mapping[str, Searcher],
        class_sets: Mapping[str, ZeroShotClassifier],
        limits: Limits,
        metrics: Metrics,
        image_urls: bool = False,
        refuse: float = REFUSE,
    ) -> None:
        """searchers: by the index's name, at least one. class_sets: made by the first one's model.
        image_urls: whether a request's image_url is fetched. refuse: see `ServeConfig`."""
        self.refuse = refuse
        self.class_sets, self.limits, self.metrics = dict(class_sets), limits, metrics
        self.ready = False  # set while the application runs
        self.num_in_flight = 0  # requests, kept by the guard
        self.pool = ThreadPoolExecutor(4, "images")  # reads metadata, makes thumbnails
        # of indexes on other machines, each its own, which may be waiting
        self._pools = {
            name: ThreadPoolExecutor(4, name)
            for name, searcher in searchers.items()
            if searcher.place.is_remote
        }
        thumbnails = Thumbnails()
        self.indexes = {
            name: ServedIndex(name, searcher, self._pools.get(name, self.pool), thumbnails)
            for name, searcher in searchers.items()
        }
        models: list[LitModel] = []
        for searcher in searchers.values():
            if all(model is not searcher.model for model in models):
                models.append(searcher.model)
        batcher = partial(
            Batcher, max_queue=limits.max_queue, num_expected=lambda: self.num_in_flight
        )
        self.uploads = Uploads(limits, metrics, image_urls)
        self.encoder = Encoder(models, self.uploads, limits, metrics, batcher)
        self.labels = LabelCache(self.encoder)
        self.search_queue = SearchQueue(searchers, metrics, batcher)
        self.temperatures: dict[str, dict[Detail, float]] = {}  # by index and patch size
        for name, searcher in searchers.items():
            self.temperatures[name] = read_temperatures(
                searcher.model_folder, partial(_fingerprints, searcher.model)
            )
            metrics.index_images.labels(name).set(len(searcher))

    def index(self, name: str | None, field: str = "index") -> ServedIndex:
        """The index of that name, the first where none is given. Raises `RequestError`, which
        blames `field`; status 503 for one whose files are damaged."""
        if name is None:
            name = next(iter(self.indexes))
        if name not in self.indexes:
            allowed = ", ".join(self.indexes)
            raise RequestError(404, f"{field}: no index {name[:80]!r}; allowed: {allowed}")
        if self.indexes[name].damage:
            raise RequestError(503, f"{field}: {name} is damaged and not served any more")
        return self.indexes[name]

    async def watch(self) -> None:
        """Check the index folders, and pick up changes of them, for ever. Searches go on."""
        for index in self.indexes.values():
            index.check_files(self.metrics)
        await asyncio.gather(*map(self._follow, self.indexes.values()))

    async def _follow(self, index: ServedIndex) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await index.reload(self.metrics)

    def close(self) -> None:
        """End all threads."""
        self.encoder.close()
        self.search_queue.close()
        self.uploads.close()
        for pool in (self.pool, *self._pools.values()):
            pool.shutdown(wait=True, cancel_futures=True)


def _fingerprints(model: LitModel) -> tuple[str, str]:
    return model.image_fingerprint, model.text_fingerprint
