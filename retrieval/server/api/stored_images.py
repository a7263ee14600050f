"""The images of an index: thumbnails, their own files, what is known of one, several as a ZIP."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from data.image_headers import format_of, has_image_suffix
from data.shards.location import ImageChangedError
from retrieval.search.hit import Hit
from retrieval.server.api.answers import AboutAnswer, FoundImage
from retrieval.server.api.route import ModelRoute
from retrieval.server.api.zip_stream import ZipStream
from retrieval.server.refusals import RequestError
from retrieval.server.requests import MAX_ID, Picture, Query
from retrieval.server.served_index import ServedIndex
from retrieval.server.service import Service
from retrieval.server.thumbnails import MAX_SIDE

MIN_SIDE = 16
MAX_DOWNLOADS = 16  # at once; each holds one file in memory
MAX_CHOSEN = 500  # images of a ZIP
MAX_ZIP_BYTES = 2 << 30
PART_BYTES = 1 << 18
# Pillow's name -> media type, suffix
FORMATS = {
    "JPEG": ("image/jpeg", "jpg"), "PNG": ("image/png", "png"), "GIF": ("image/gif", "gif"),
    "BMP": ("image/bmp", "bmp"), "TIFF": ("image/tiff", "tif"), "WEBP": ("image/webp", "webp"),
    "AVIF": ("image/avif", "avif"), "HEIF": ("image/heic", "heic"),
}  # fmt: skip
FILE_HEADERS = {  # files come from strangers
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; "
    "sandbox",
    "X-Content-Type-Options": "nosniff",
}


def routes(service: Service) -> APIRouter:
    """The endpoints of single images and downloads."""
    router = APIRouter(prefix="/v1", route_class=ModelRoute)
    downloads = _Downloads()

    @router.get(
        "/images/{index}/{id}",
        summary="A thumbnail, JPEG",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def image(request: Request, index: str, id: int, size: int = 224) -> Response:
        if not MIN_SIDE <= size <= MAX_SIDE:
            raise RequestError(400, f"size: {size}; allowed: {MIN_SIDE} to {MAX_SIDE} pixels")
        found = service.index(index)
        hit = await _stored(found, id)
        headers = _kept(f"{hit.location}{size}")
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        (jpeg,) = await found.small_jpegs([hit.location], size)
        if jpeg is None:
            await _read(found, hit)  # says why
            raise _lost(id)
        return Response(jpeg, headers=headers, media_type="image/jpeg")

    @router.get(
        "/images/{index}/{id}/file",
        summary="The image's own file; attached with ?download=true",
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}},
    )
    async def file(request: Request, index: str, id: int, download: bool = False) -> Response:
        found = service.index(index)
        hit = await _stored(found, id)
        headers = _kept(f"{hit.location}") | FILE_HEADERS
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        with ExitStack() as place:
            place.enter_context(downloads.one())
            data = await _read(found, hit)
            media_type, _ = FORMATS[format_of(data) or ""]
            headers["Content-Disposition"] = _disposition(download, file_name(hit.key, data))
            headers["Content-Length"] = str(len(data))
            return _Download(_parts(data), headers, media_type, place.pop_all())

    @router.get("/images/{index}/{id}/about", summary="What is known of an image")
    async def about(index: str, id: int) -> AboutAnswer:
        found = service.index(index)
        hit = await _stored(found, id)
        return AboutAnswer(**dict(FoundImage.of(found.name, hit)), bytes=hit.size)

    @router.get(
        "/indices/{index}/zip",
        summary="The files of several images, as a ZIP",
        response_class=Response,
        responses={200: {"content": {"application/zip": {}}}},
    )
    async def zip(index: str, ids: str) -> Response:
        """ids: whole numbers with commas between them."""
        found = service.index(index)
        hits = [Hit.of(0.0, row) for _, row in await found.rows(_parse_ids(ids))]
        if not hits:
            raise RequestError(404, f"ids: none is in index {found.name}")
        if sum(hit.size for hit in hits) > MAX_ZIP_BYTES:
            sentence = f"ids: these files have more than {MAX_ZIP_BYTES >> 30} GiB; choose fewer"
            raise RequestError(400, sentence)
        headers = {"Content-Disposition": _disposition(True, f"{found.name}.zip")}
        parts = _zip(service, found, hits)
        with ExitStack() as place:
            place.enter_context(downloads.one())
            return _Download(parts, headers, "application/zip", place.pop_all())

    return router


class _Downloads:
    """How many files are held to be sent."""

    def __init__(self) -> None:
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place, from before the file is read. Raises `RequestError` where all are taken."""
        if self._count >= MAX_DOWNLOADS:
            raise RequestError(429, "too many downloads at once; try again in a second")
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


class _Download(StreamingResponse):
    """Gives its place back at its end, also where the client left before its first part."""

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        headers: dict[str, str],
        media_type: str,
        place: ExitStack,
    ) -> None:
        super().__init__(parts, headers=headers, media_type=media_type)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def image_of(found: ServedIndex, asked: Picture | Query) -> str | bytes | None:
    """The file of a request's image, as it was sent or of the index; None for one named by URL.
    Raises `RequestError`."""
    return asked.image if asked.id is None else await _read(found, await _stored(found, asked.id))


async def _stored(found: ServedIndex, id: int) -> Hit:
    """Raises `RequestError` for an image that the index does not have."""
    if not 0 <= id <= MAX_ID:
        raise RequestError(400, f"id: {id}; allowed: 0 to {MAX_ID}")
    rows = await found.rows([id])
    if not rows:
        raise RequestError(404, f"id: {id} is not in index {found.name}")
    return Hit.of(0.0, rows[0][1])


async def _read(found: ServedIndex, hit: Hit) -> bytes:
    """The image's file, surely an image. Raises `RequestError`."""
    try:
        data = await found.file(hit.location)
    except ImageChangedError:
        raise _lost(hit.id, "has changed since it was indexed") from None
    except (OSError, ValueError):
        raise _lost(hit.id) from None
    if format_of(data) not in FORMATS:  # an index of 0.1.0 does not know its files' digests
        raise _lost(hit.id, "is no image any more")
    return data


def _lost(id: int, why: str = "cannot be read any more") -> RequestError:
    return RequestError(404, f"id: the file of image {id} {why}")


def _kept(what: str) -> dict[str, str]:
    """Headers that let a browser keep an answer for a while."""
    mark = hashlib.blake2b(what.encode(), digest_size=12).hexdigest()
    return {"ETag": f'"{mark}"', "Cache-Control": "private, max-age=300"}


def file_name(key: str, data: bytes) -> str:
    """The last part of a key, with the suffix of an image; safe in any file system."""
    name = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", re.split(r"[/\\]", key)[-1]).strip(". ")
    if has_image_suffix(name):
        return name
    return f"{name or 'image'}.{FORMATS[format_of(data) or ''][1]}"


def _disposition(download: bool, name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "_", name)
    kind = "attachment" if download else "inline"
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


async def _parts(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PART_BYTES):
        yield data[start : start + PART_BYTES]


async def _zip(service: Service, found: ServedIndex, hits: list[Hit]) -> AsyncIterator[bytes]:
    """The files that can be read, and a list of those that cannot."""
    stream, lost = ZipStream(), []

    def add(name: str, data: bytes) -> bytes:
        stream.add(name, data)
        return stream.take()

    for hit in hits:
        try:
            data = await _read(found, hit)
        except RequestError as error:
            lost.append(f"{hit.key}: {error.sentence}\n")
            continue
        # Checksum and copies of a large file take longer than other requests should wait.
        loop, name = asyncio.get_running_loop(), file_name(hit.key, data)
        data = await loop.run_in_executor(service.pool, add, name, data)
        async for part in _parts(data):
            yield part
    if lost:
        stream.add("left out.txt", "".join(lost).encode())
    yield stream.end()


def _parse_ids(text: str) -> list[int]:
    """Raises `RequestError`."""
    parts = text.split(",")
    if len(parts) > MAX_CHOSEN:
        raise RequestError(400, f"ids: {len(parts)} are given; at most {MAX_CHOSEN}")
    if not all(map(_is_id, parts)):
        raise RequestError(400, f"ids: {text[:80]!r}; allowed: numbers with commas between them")
    return list(dict.fromkeys(map(int, parts)))


def _is_id(text: str) -> bool:
    # Longer ones are not converted: Python refuses to from 4,300 digits on.
    return text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= MAX_ID
