"""EXIF blocks of any contents, written by hand: what a camera writes, and what nobody should."""

import struct
from collections.abc import Mapping

ASCII, SHORT, LONG, RATIONAL = 2, 3, 4, 5
EXIF, GPS = 0x8769, 0x8825


def text(value: str) -> tuple[int, int, bytes]:
    data = value.encode() + b"\0"
    return ASCII, len(data), data


def rationals(*pairs: tuple[int, int], order: str = "<") -> tuple[int, int, bytes]:
    return RATIONAL, len(pairs), b"".join(struct.pack(order + "II", *pair) for pair in pairs)


Entry = tuple[int, int, bytes]


def block(
    main: Mapping[int, Entry],
    exif: Mapping[int, Entry] | None = None,
    gps: Mapping[int, Entry] | None = None,
    order: str = "<",
) -> bytes:
    """A TIFF header and up to three directories; values in `order` are the caller's."""
    parts = {0: dict(main)}
    for tag, values in ((EXIF, exif), (GPS, gps)):
        if values is not None:
            parts[tag] = dict(values)
            parts[0][tag] = LONG, 1, b"\0\0\0\0"
    starts, at = {}, 8
    for name, values in parts.items():
        starts[name] = at
        at += 2 + 12 * len(values) + 4 + sum(len(v[2]) for v in values.values() if len(v[2]) > 4)
    out = b"II*\0" if order == "<" else b"MM\0*"
    out += struct.pack(order + "I", 8)
    for name, values in parts.items():
        body = struct.pack(order + "H", len(values))
        behind, place = b"", starts[name] + 2 + 12 * len(values) + 4
        for tag, (kind, count, data) in sorted(values.items()):
            if tag in starts:
                data = struct.pack(order + "I", starts[tag])
            if len(data) > 4:
                field = struct.pack(order + "I", place + len(behind))
                behind += data
            else:
                field = data.ljust(4, b"\0")
            body += struct.pack(order + "HHI", tag, kind, count) + field
        out += body + b"\0\0\0\0" + behind
    return out


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    """A JPEG with this block in front."""
    segment = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
