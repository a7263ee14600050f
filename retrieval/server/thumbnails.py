"""Thumbnails of stored images: small JPEGs, the last used ones kept in memory."""

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image

from data.images import decode_image
from data.problems import BadSample
from data.shards.location import ImageChangedError, ImageLocation, read_image

MAX_SIDE = 1024  # pixels of a thumbnail
MAX_STORED_PIXELS = 100_000_000
LOST_S = 10.0  # a shard that cannot be read is not tried again for so long
MAX_LOST = 10_000  # shards remembered


class Thumbnails:
    """Small JPEGs of stored images, the last used ones kept. Safe for threads."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[ImageLocation, int], bytes] = OrderedDict()
        self._lost: dict[str, float] = {}  # shard -> until when
        self.num_bytes = 0  # of what is kept

    def get(self, location: ImageLocation, side: int) -> bytes | None:
        """A JPEG that fits a square of `side` pixels, None where the image cannot be read."""
        (kept,), missing = self.kept([location], side)
        if not missing:
            return kept
        try:
            data = read_image(location)
        except ImageChangedError:  # which says nothing of its shard's other images
            return None
        except (OSError, ValueError):
            with self._lock:
                if len(self._lost) >= MAX_LOST:
                    self._lost.clear()
                self._lost[location.shard] = time.monotonic() + LOST_S
            return None
        try:
            image = decode_image(data, MAX_STORED_PIXELS)
        except BadSample:
            return None
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=88)
        data = out.getvalue()
        with self._lock:
            if (location, side) not in self._kept:
                self._kept[location, side] = data
                self.num_bytes += len(data)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= len(self._kept.popitem(last=False)[1])
        return data

    def kept(
        self, locations: Sequence[ImageLocation], side: int
    ) -> tuple[list[bytes | None], list[int]]:
        """What `get` gives where that costs nothing, and the numbers of those to be read."""
        found: list[bytes | None] = [None] * len(locations)
        missing = []
        now = time.monotonic()
        with self._lock:
            for number, location in enumerate(locations):
                if (location, side) in self._kept:
                    self._kept.move_to_end((location, side))
                    found[number] = self._kept[location, side]
                elif now >= self._lost.get(location.shard, now):
                    missing.append(number)
        return found, missing
