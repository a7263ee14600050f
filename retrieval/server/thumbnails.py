"""Thumbnails of stored images: small JPEGs, the last used ones kept in memory."""

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from data.errors import UsageError
from data.images import decode_image
from data.problems import BadSample
from data.shards.index import open_shard

MAX_SIDE = 1024  # pixels of a thumbnail
MAX_STORED_PIXELS = 100_000_000
LOST_S = 10.0  # a shard that cannot be opened is not tried again for so long
MAX_LOST = 10_000  # shards remembered


class Place(NamedTuple):
    """Where an image's bytes lie."""

    shard: str
    offset: int
    size: int


class Thumbnails:
    """Small JPEGs of stored images, the last used ones kept. Safe for threads."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Place, int], bytes] = OrderedDict()
        self._lost: dict[str, float] = {}  # shard -> until when
        self.num_bytes = 0  # of what is kept

    def get(self, place: Place, side: int) -> bytes | None:
        """A JPEG that fits a square of `side` pixels, None where the image cannot be read."""
        (kept,), missing = self.kept([place], side)
        if not missing:
            return kept
        try:
            file = open_shard(place.shard)
        except (OSError, ValueError, UsageError):
            with self._lock:
                if len(self._lost) >= MAX_LOST:
                    self._lost.clear()
                self._lost[place.shard] = time.monotonic() + LOST_S
            return None
        try:
            with file:
                file.seek(place.offset)
                image = decode_image(file.read(place.size), MAX_STORED_PIXELS)
        except (OSError, ValueError, BadSample):
            return None
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=88)
        data = out.getvalue()
        with self._lock:
            if (place, side) not in self._kept:
                self._kept[place, side] = data
                self.num_bytes += len(data)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= len(self._kept.popitem(last=False)[1])
        return data

    def kept(self, places: Sequence[Place], side: int) -> tuple[list[bytes | None], list[int]]:
        """What `get` gives where that costs nothing, and the numbers of those to be read."""
        found: list[bytes | None] = [None] * len(places)
        missing = []
        now = time.monotonic()
        with self._lock:
            for number, place in enumerate(places):
                if (place, side) in self._kept:
                    self._kept.move_to_end((place, side))
                    found[number] = self._kept[place, side]
                elif now >= self._lost.get(place.shard, now):
                    missing.append(number)
        return found, missing
