"""When, where and with what a photo was taken, by its EXIF block. Imports no Pillow.

Files come from strangers: a block that is damaged or lies costs a bounded time, and gives nothing.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

MAX_BLOCK = 1 << 16  # bytes that are looked at, as a JPEG's segment has at most
JPEG_HEAD = 1 << 18  # bytes
MAX_ENTRIES = 512  # of one directory
MAX_TEXT = 100  # characters
_STARTS = (b"Exif\0\0II*\0", b"Exif\0\0MM\0*", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08")

# Tags of Exif 2.32, CIPA DC-008, tables 4, 5 and 15.
_MAKE, _MODEL, _CHANGED, _EXIF, _GPS = 0x010F, 0x0110, 0x0132, 0x8769, 0x8825
_TAKEN, _DIGITISED = 0x9003, 0x9004
_NORTH, _LATITUDE, _EAST, _LONGITUDE = 1, 2, 3, 4
_ASCII, _SHORT, _LONG, _RATIONAL = 2, 3, 4, 5
_SIZES = {_ASCII: 1, _SHORT: 2, _LONG: 4, _RATIONAL: 8}
_WRITTEN = re.compile(r"(\d{4})[:/-](\d\d)[:/-](\d\d)(?:[ T](\d\d):(\d\d):(\d\d))?")


@dataclass(frozen=True)
class Exif:
    """None is what a photo does not say."""

    taken: str | None = None  # by the camera's clock, 2019-07-14T12:30:05
    latitude: float | None = None  # degrees, north is positive
    longitude: float | None = None  # degrees, east is positive
    camera: str | None = None


UNKNOWN = Exif()


def read_exif(data: bytes) -> Exif:
    """What an image file of any format says. Never raises for what a file may hold."""
    if data.startswith(b"\xff\xd8"):  # a JPEG has it before its pixels
        data = data[:JPEG_HEAD]
    places = [at for start in _STARTS if (at := data.find(start)) >= 0]
    if not places:
        return UNKNOWN
    at = min(places)
    block = data[at : at + MAX_BLOCK].removeprefix(b"Exif\0\0")
    order = "<" if block.startswith(b"II") else ">"
    main = _directory(block, order, _long(block, order, 4))
    exif = _directory(block, order, _pointer(main.get(_EXIF)))
    gps = _directory(block, order, _pointer(main.get(_GPS)))
    latitude, longitude = (
        _degrees(gps.get(tag), gps.get(side), negative, most)
        for tag, side, negative, most in (
            (_LATITUDE, _NORTH, "S", 90),
            (_LONGITUDE, _EAST, "W", 180),
        )
    )
    if latitude is None or longitude is None or latitude == longitude == 0:
        latitude = longitude = None  # zeros are what a receiver without a fix writes
    dates = (exif.get(_TAKEN), exif.get(_DIGITISED), main.get(_CHANGED))
    taken = next((date for date in map(_date, dates) if date), None)
    return Exif(taken, latitude, longitude, _camera(main.get(_MAKE), main.get(_MODEL)))


_Value = str | list[float]


def _directory(block: bytes, order: str, at: int) -> dict[int, _Value]:
    """The values of one directory that can be read, by tag."""
    return dict(_values(block, order, at)) if 8 <= at <= len(block) - 2 else {}


def _values(block: bytes, order: str, at: int) -> Iterator[tuple[int, _Value]]:
    (count,) = struct.unpack_from(f"{order}H", block, at)
    for entry in range(at + 2, at + 2 + 12 * min(count, MAX_ENTRIES), 12):
        if entry + 12 > len(block):
            return
        tag, kind, number = struct.unpack_from(f"{order}HHI", block, entry)
        size = _SIZES.get(kind, 0) * number
        place = entry + 8 if size <= 4 else _long(block, order, entry + 8)
        if 0 < size <= 4 * MAX_TEXT and place + size <= len(block):
            yield tag, _value(block[place : place + size], order, kind)


def _value(raw: bytes, order: str, kind: int) -> _Value:
    if kind == _ASCII:
        return raw.partition(b"\0")[0].decode("utf-8", "replace")
    letter = "H" if kind == _SHORT else "I"
    numbers = struct.unpack(f"{order}{len(raw) // struct.calcsize(order + letter)}{letter}", raw)
    if kind != _RATIONAL:
        return [float(number) for number in numbers]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [above / below if below else math.nan for above, below in pairs]


def _long(block: bytes, order: str, at: int) -> int:
    return struct.unpack_from(f"{order}I", block, at)[0] if at + 4 <= len(block) else 0


def _pointer(value: _Value | None) -> int:
    return int(value[0]) if isinstance(value, list) and math.isfinite(value[0]) else 0


def _date(value: _Value | None) -> str | None:
    """Cameras whose clock was never set write zeros or blanks."""
    found = _WRITTEN.match(value) if isinstance(value, str) else None
    if not found:
        return None
    try:
        return datetime(*(int(part or 0) for part in found.groups())).isoformat()  # type: ignore[arg-type]
    except ValueError:
        return None


def _degrees(value: _Value | None, side: _Value | None, negative: str, most: int) -> float | None:
    if not isinstance(value, list) or not isinstance(side, str) or not 1 <= len(value) <= 3:
        return None
    degrees = sum(part / 60**power for power, part in enumerate(value))
    if not degrees <= most:  # NaN is not either
        return None
    return round(-degrees if side.strip().upper() == negative else degrees, 6)


def _camera(make: _Value | None, model: _Value | None) -> str | None:
    """Make and model; the model alone where it begins with the make's first word."""
    first, second = (_plain(value) for value in (make, model))
    word = first.partition(" ")[0].lower()
    if second and word and second.lower().startswith(word):
        first = ""
    return f"{first} {second}".strip()[:MAX_TEXT] or None


def _plain(value: _Value | None) -> str:
    text = value if isinstance(value, str) else ""
    return " ".join("".join(c for c in text if c.isprintable()).split())
