"""Images that requests bring, or name by URL: from their bytes to the pixels that a model takes."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from PIL import Image

from contrastive.model.lit import LitModel
from contrastive.model.shaped import ShapedPixels
from data.image_headers import IMAGE_KINDS
from data.images import decode_image
from data.problems import BadSample
from retrieval.detail import Detail
from retrieval.embed.encode import read_image
from retrieval.regions.boxes import check_box
from retrieval.regions.parts import read_part
from retrieval.server.config import Limits
from retrieval.server.fetch import fetch
from retrieval.server.monitoring import Metrics
from retrieval.server.refusals import RequestError

FETCH_S = 10.0


class Uploads:
    """Fetches and decodes in threads of its own. Safe for one event loop."""

    def __init__(self, limits: Limits, metrics: Metrics, image_urls: bool) -> None:
        """image_urls: whether a request's image_url is fetched."""
        self._limits, self._metrics, self._image_urls = limits, metrics, image_urls
        self._decoding = ThreadPoolExecutor(4, "decode")
        self._fetching = ThreadPoolExecutor(4, "fetch")

    def close(self) -> None:
        for pool in (self._decoding, self._fetching):
            pool.shutdown(wait=True, cancel_futures=True)

    async def pixels(
        self,
        model: LitModel,
        image: str | bytes | None,
        image_url: str | None,
        details: Sequence[Detail],
        box: Sequence[float] | None = None,
    ) -> dict[Detail, ShapedPixels]:
        """An image file, in base64 or fetched, or the part of it in a box, as `model` takes it at
        these patch sizes or within these budgets. Raises `RequestError`."""
        return await self._decode(partial(read_upload, model, details, box), image, image_url)

    async def picture(self, image: str | bytes | None, image_url: str | None) -> Image.Image:
        """An image file at its own resolution, RGB. Raises `RequestError`."""
        return await self._decode(read_picture, image, image_url)

    async def _decode(
        self,
        read: Callable[[bytes, int, str], Any],
        image: str | bytes | None,
        image_url: str | None,
    ) -> Any:
        """What `read` makes of a file's bytes, the limit of pixels and the name of the field."""
        field = "image"
        if image is None:
            field, image = "image_url", await self._fetch(image_url or "")
        data = image if isinstance(image, bytes) else from_base64(image, field)

        def decode() -> Any:
            with self._metrics.timed("image_prepro_time"):
                return read(data, self._limits.max_pixels, field)

        return await asyncio.get_running_loop().run_in_executor(self._decoding, decode)

    async def _fetch(self, url: str) -> bytes:
        if not self._image_urls:
            raise RequestError(
                400, "image_url: this server fetches nothing; send the file as image"
            )

        def download() -> bytes:
            with self._metrics.timed("download_time"):
                return fetch(url, self._limits.max_body_bytes, FETCH_S)

        return await asyncio.get_running_loop().run_in_executor(self._fetching, download)


def from_base64(text: str, field: str) -> bytes:
    """The bytes of an image sent as base64, perhaps as a data: URL."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            400, f"{field}: is not base64; allowed: an image file in base64"
        ) from None


def read_upload(
    model: LitModel,
    details: Sequence[Detail],
    box: Sequence[float] | None,
    data: bytes,
    max_pixels: int,
    field: str,
) -> dict[Detail, ShapedPixels]:
    """Normalised pixels of untrusted bytes."""
    with _refusing(max_pixels, field):
        if box is not None:
            return read_part(model, data, check_box(box), max_pixels, details)
        return read_image(model, data, max_pixels, details)


def read_picture(data: bytes, max_pixels: int, field: str) -> Image.Image:
    """The picture of untrusted bytes."""
    with _refusing(max_pixels, field):
        return decode_image(data, max_pixels)


@contextmanager
def _refusing(max_pixels: int, field: str) -> Iterator[None]:
    """A bad image is a `RequestError`."""
    try:
        yield
    except BadSample as error:
        what = error.kind.replace("_", " ")
        sentence = f"{field}: {what} ({error.cause}); allowed: {IMAGE_KINDS}"
        raise RequestError(400, f"{sentence} of at most {max_pixels:,} pixels") from error
