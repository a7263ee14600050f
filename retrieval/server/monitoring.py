"""What /metrics reports to Prometheus. Steps have clip-retrieval's names, for its dashboards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)
STEPS = {
    "full_knn_request_time": "Time spent processing a search",
    "download_time": "Time spent downloading an image_url",
    "text_clip_inference_time": "Time spent in a text forward, tokens included",
    "image_clip_inference_time": "Time spent in an image forward",
    "image_prepro_time": "Time spent decoding and resizing a query image",
    "knn_index_time": "Time spent searching an index, metadata and duplicates included",
    "refine_time": "Time spent encoding and ranking candidates again",
}


@dataclass
class Clock:
    """How long a block took, set at its end."""

    ms: float = 0.0


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._steps = {
            name: Histogram(name, text, registry=self.registry, buckets=SECONDS)
            for name, text in STEPS.items()
        }
        self.requests = Counter(
            "http_requests", "Requests answered", ("path", "status"), registry=self.registry
        )
        self.batch_size = Histogram(
            "batch_size",
            "Requests that shared a forward or a search",
            ("queue",),
            registry=self.registry,
            buckets=SIZES,
        )
        self.index_images = Gauge(
            "index_images", "Images that can be found", ("index",), registry=self.registry
        )
        self.reloads = Counter(
            "index_reloads", "Changes taken up", ("index", "outcome"), registry=self.registry
        )

    @contextmanager
    def timed(self, step: str) -> Iterator[Clock]:
        """Observe how long the block takes, where it does not raise."""
        clock, start = Clock(), time.perf_counter()
        yield clock
        seconds = time.perf_counter() - start
        clock.ms = 1e3 * seconds
        self._steps[step].observe(seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
