"""Single images, read from where they lie in a shard or in a file of their own."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from data.errors import UsageError
from data.shards.stream import open_shard


class ImageChangedError(UsageError):
    """What lies in an image's place is not that image any more."""


class ImageLocation(NamedTuple):
    """Where the bytes of an image file lie, and what tells that they are still its own."""

    shard: str  # a tar, or the image's own file
    offset: int  # bytes
    size: int  # bytes
    digest: int = 0  # `image_digest` of the bytes; 0: not known, then they are not checked

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "ImageLocation":
        """Of an image by its metadata, which may lack the digest."""
        return cls(row["shard"], row["offset"], row["size"], row.get("digest") or 0)


def image_digest(data: bytes) -> int:
    """BLAKE2b of 64 bits as a signed integer, never 0."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def read_image(location: ImageLocation) -> bytes:
    """The bytes of an image file.

    Raises `ImageChangedError` where the shard holds other bytes there now, `OSError` where it is
    gone, `ValueError` where it cannot seek (`UsageError` where a program writes it: webdataset's
    `pipe:`).
    """
    with closing(_LastShard()) as last:
        return last.read(location)


def read_images(locations: Iterable[ImageLocation]) -> Iterator[bytes | None]:
    """`read_image` of each, None where it would raise. Neighbours of one shard share its opening:
    sort by location first."""
    with closing(_LastShard()) as last:
        for location in locations:
            try:
                data = last.read(location)
            except (OSError, ValueError):
                data = None
            yield data


class _LastShard:
    """The shard read last, kept open for the next image."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._file: Any = None

    def read(self, location: ImageLocation) -> bytes:
        if location.shard != self._name:
            self.close()
            self._file = open_shard(location.shard)
            self._name = location.shard
        self._file.seek(location.offset)
        data: bytes = self._file.read(location.size)
        changed = location.digest and image_digest(data) != location.digest
        if changed or len(data) < location.size:
            raise ImageChangedError(
                f"{location.shard} has changed: it holds another image at byte {location.offset}"
            )
        return data

    def close(self) -> None:
        self._name = None
        if self._file is not None:
            self._file.close()
        self._file = None
