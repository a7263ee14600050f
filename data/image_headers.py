"""What an image file says of itself before anything of it is decoded. Imports no Pillow."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.errors import UsageError

# Suffixes of the files that are taken for images, everywhere: in tars, in folders, as queries.
IMAGE_EXTS = frozenset(
    {"jpg", "jpeg", "jpe", "jif", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff",
     "avif", "heic", "heif"}
)  # fmt: skip
# Folders of thumbnails, bins and resource forks, by Synology, QNAP, Windows and macOS; lower case.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "__macosx"}
)
IMAGE_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"  # for sentences

MAX_SCANS = 40  # of a JPEG; progressive ones have about 10
MAX_EXIF = 1 << 16  # bytes; Pillow's reader may copy the whole block once for every 24 bytes of it
MAX_PARTS = 4096  # segments, chunks or blocks, which Pillow passes one by one in Python
MAX_PACKED = 64  # compressed texts and profiles of a PNG; each is at most 1 MiB unpacked

_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_OTHERS = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"{", "JSON or other text"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"8bps", "a Photoshop file"),
    (b"\0\0\1\0", "an icon file"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL image"),
    (b"\0\0\0\x0cjp  ", "a JPEG 2000 image"),
)


def has_image_suffix(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in IMAGE_EXTS


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, not below it, by name; hidden ones are left out."""
    files = sorted(folder.iterdir())
    return [f for f in files if has_image_suffix(f.name) and not f.name.startswith(".")]


def names_image(text: str) -> bool:
    """Whether a text is the path of an image file rather than words. Raises `UsageError` for what
    looks like a file's name and is none, and for the path of a folder."""
    if os.sep in text and os.path.isdir(text):  # of pathlib, a long text would be an OSError
        raise UsageError(f"{text} is a folder; name images in it, such as {Path(text)}/*.jpg")
    if not has_image_suffix(text):
        return False
    if os.path.isfile(text):
        return True
    if " " in text:
        return False
    raise UsageError(f"{text}: there is no such image")


def format_of(data: bytes) -> str | None:
    """Pillow's name of an image file's format, None for what is none of those that are read."""
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(_u32(data, 0), 128), 4))}
        if brands.intersection(_AVIF):
            return "AVIF"
        if brands.intersection(_HEIF):
            return "HEIF"
    return None


def what_it_is(data: bytes) -> str:
    """A few words on a file that is no image."""
    if not data:
        return "an empty file"
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _OTHERS:
        if data[:64].lower().startswith(beginning) or start.startswith(beginning):
            return f"{what}, {len(data)} bytes"
    if data[4:8] == b"ftyp":
        return f"a video or sound file, {len(data)} bytes"
    if not data[:64].strip(b"\0"):
        return f"zeros, {len(data)} bytes"
    text = data[:24].decode("utf-8", "replace")
    if text.rstrip("\ufffd\r\n\t").replace("\n", " ").isprintable():
        return f"text that begins {text!r}, {len(data)} bytes"
    return f"{len(data)} bytes that begin {data[:8].hex(' ')}"


def is_ordinary(data: bytes, kind: str) -> bool:
    """Whether the pixels and bytes of a file bound what Pillow needs to decode it, in time and
    memory; false for what a look at the header cannot prove.

    kind: as `format_of` has it.
    """
    walk = _WALKS.get(kind)
    try:
        return walk is not None and walk(data)
    except (IndexError, struct.error):  # it ends within its header
        return False


def _jpeg(data: bytes) -> bool:
    """Few scans: each one passes over all pixels, and may be as short as ten bytes."""
    array = np.frombuffer(data, np.uint8)
    marked = array[np.flatnonzero(array[:-1] == 0xFF) + 1]  # bytes.count is several times slower
    if np.count_nonzero(marked == 0xDA) > MAX_SCANS:  # such a pair is nowhere within a scan
        return False
    at, exif = 2, 0
    for _ in range(MAX_PARTS):
        fill, marker, size = struct.unpack_from(">BBH", data, at)
        if fill != 0xFF or size < 2:
            return False
        if marker == 0xDA:
            return exif <= MAX_EXIF
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            exif += size
        at += 2 + size
    return False


def _png(data: bytes) -> bool:
    at, packed, size = 8, 0, len(data)
    for _ in range(MAX_PARTS + size // 4096):
        if at + 8 > size:
            return True  # the rest is missing, and so no work
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return True
        if kind != b"IDAT":
            if kind == b"eXIf" and length > MAX_EXIF:
                return False
            if kind in (b"iCCP", b"zTXt", b"iTXt"):
                packed += 1
            if packed > MAX_PACKED or data.startswith(b"Raw profile type", at + 8):
                return False  # such a text is EXIF too, of unknown length
        at += 12 + length
    return False


def _webp(data: bytes) -> bool:
    at, size = 12, len(data)
    for _ in range(MAX_PARTS + size // 4096):
        if at + 8 > size:
            return True
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF" and length > MAX_EXIF:
            return False
        at += 8 + length + length % 2
    return False


def _gif(data: bytes) -> bool:
    """Few blocks before the first frame; no other frame is decoded."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    within = False  # an extension
    for _ in range(MAX_PARTS):
        if within:
            within = data[at] > 0
            at += 1 + data[at]
        elif data[at] == 0x21:
            within = True
            at += 2
        else:
            return data[at] == 0x2C
    return False


def _bmp(data: bytes) -> bool:
    """Not run-length encoded, which Pillow reads in Python."""
    return data[14:18] == b"\x0c\0\0\0" or data[30:34] in (b"\0\0\0\0", b"\3\0\0\0")


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", data, at)[0])


_WALKS: dict[str, Callable[[bytes], bool]] = {
    "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "BMP": _bmp,
}  # fmt: skip
