"""Small files that would take minutes or gigabytes to decode, and good ones that look odd."""

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from shard_maker import encode


def red(kind: str, side: int = 64, **options: Any) -> bytes:
    return encode(Image.new("RGB", (side, side), (200, 30, 10)), kind, **options)


def many_scans(count: int = 60_000, side: int = 900) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = red("JPEG", side, progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + b"\xff\xd9"


def many_segments(count: int = 3_000_000) -> bytes:
    """A JPEG with that many empty comments, which Pillow reads one by one."""
    data = red("JPEG")
    return data[:2] + b"\xff\xfe\0\2" * count + data[2:]


def large_tile(side: int = 20_000) -> bytes:
    """A TIFF of 64 x 64 pixels in one tile of side x side."""
    packed = zlib.compress(bytes(side * side), 1)
    start = 8 + 2 + 12 * 10 + 4
    return tiff(
        [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side),
         (324, start), (325, len(packed))],
        packed,
    )  # fmt: skip


def tiff(entries: list[tuple[int, int]], data: bytes) -> bytes:
    """Of (tag, number)s; the data begin behind them."""
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + table + bytes(4) + data


def floats(side: int) -> bytes:
    """A compressed TIFF of 32-bit floats, 0 to 1 from top to bottom."""
    ramp = np.repeat(np.linspace(0, 1, side, dtype=np.float32)[:, None], side, 1)
    return encode(Image.fromarray(ramp), "TIFF", compression="tiff_adobe_deflate")


def with_chunk(kind: bytes, data: bytes, times: int = 1, *, behind: bool = False) -> bytes:
    """A PNG with a chunk before or behind its pixels."""
    crc = struct.pack(">I", zlib.crc32(kind + data))
    chunk = struct.pack(">I", len(data)) + kind + data + crc
    png = red("PNG")
    at = len(png) - 12 if behind else 33
    return png[:at] + chunk * times + png[at:]


def packed_text(num_bytes: int) -> bytes:
    """The content of a zTXt or iCCP chunk."""
    return b"name\0\0" + zlib.compress(bytes(num_bytes))
