"""Single images, read from where they lie in a shard or in a file of their own."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from data.shards.stream import open_shard


class ImageLocation(NamedTuple):
    """Where the bytes of an image file lie."""

    shard: str  # a tar, or the image's own file
    offset: int  # bytes
    size: int  # bytes


def read_image(location: ImageLocation) -> bytes:
    """The bytes of an image file.

    Raises `OSError` where the shard is gone, `ValueError` where it cannot seek (`UsageError` where
    a program writes it: webdataset's `pipe:`).
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
        return data

    def close(self) -> None:
        self._name = None
        if self._file is not None:
            self._file.close()
        self._file = None
