"""Tar archives read by their headers: where every sample lies, and what is wrong with the rest.

One reader serves both ways of access. Over a local file it seeks from header to header and never
touches a pixel; over a stream it reads forward. So a shard has the same samples, the same numbers
and the same problems whichever way it comes.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data.problems import Problem

IMAGE_EXTS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
TEXT_EXTS = frozenset({"txt", "json", "cls"})
# A member is read into memory whole; these bound what one header can ask for.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_EXTENDED_HEADER = 1 << 20
_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's rule for KEY.ext
_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these too


class TarCut(Exception):  # noqa: N818
    """The archive ends, or stops making sense, before its end marker. `name`: the member hit."""

    def __init__(self, kind: str, name: str, cause: str) -> None:
        super().__init__(cause)
        self.kind, self.name, self.cause = kind, name, cause


class LocalCursor:
    """A position in a file that can seek. It only moves forward, and skipping costs nothing."""

    def __init__(self, file: BinaryIO) -> None:
        self._fd = file.fileno()
        self._end = os.fstat(self._fd).st_size
        self.position = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the archive."""
        data = read_at(self._fd, self.position, min(size, max(self._end - self.position, 0)))
        self.position += len(data)
        return data

    def advance_to(self, position: int) -> bool:
        """Move; False when the archive turned out to end before `position`."""
        self.position = position
        return True

    def holds(self, position: int) -> bool:
        """False when the archive is known to end before `position`."""
        return position <= self._end


class StreamCursor:
    """The same over anything with `read`. Skipping reads and forgets."""

    def __init__(self, file: Any) -> None:
        """`file`: anything with `read(size)`; fsspec's and webdataset's files are no `BinaryIO`."""
        self._file = file
        self.position = 0

    def read(self, size: int) -> bytes:
        parts, left = [], size
        while left and (part := self._file.read(min(left, 1 << 22))):
            parts.append(part)
            left -= len(part)
        self.position += size - left
        return b"".join(parts)

    def advance_to(self, position: int) -> bool:
        while self.position < position:
            if not self.read(min(position - self.position, 1 << 20)):
                return False
        return True

    def holds(self, position: int) -> bool:
        return True  # found out by reading


Cursor = LocalCursor | StreamCursor


def read_at(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, fewer at the end of the file. Leaves the file position alone."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


@dataclass(frozen=True)
class Member:
    """One regular file of the archive; `offset` and `size` of its data in bytes."""

    name: str
    offset: int
    size: int


def iter_members(cursor: Cursor) -> Iterator[Member]:
    """Regular files in order (ustar, GNU and pax names and sizes).

    The consumer may read a member's data from the cursor before it asks for the next one.
    Raises `TarCut` where the archive is damaged, after all that came before.
    """
    name_override: bytes | None = None
    size_override: int | None = None
    while True:
        start = cursor.position
        block = cursor.read(_BLOCK)
        if len(block) < _BLOCK:
            raise TarCut("truncated", "", f"no end-of-archive marker at byte {start}")
        if block == _ZEROS:
            return
        name, size, kind = _parse_header(block, start)
        if kind == b"S":  # old GNU sparse files: further headers follow
            more = block[482]
            while more:
                block = cursor.read(_BLOCK)
                more = block[504] if len(block) == _BLOCK else 0
        data = cursor.position
        if kind in (b"x", b"L"):
            if size > _MAX_EXTENDED_HEADER:
                raise TarCut("truncated", "", f"extended header of {size} bytes at byte {start}")
            payload = cursor.read(size)
            if kind == b"L":
                name_override = payload.split(b"\0", 1)[0]
            else:
                records = _parse_pax(payload, start)
                name_override = records.get(b"path", name_override)
                size_override = _pax_size(records, start)
            cursor.advance_to(data + _padded(size))
            continue
        if kind not in (b"g", b"K"):
            name = name if name_override is None else name_override
            size = size if size_override is None else size_override
            name_override = size_override = None
        text = name.decode("utf-8", "surrogateescape")
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):  # links, devices, folders: no data
            size = 0
        elif not cursor.holds(data + size):
            raise TarCut("truncated", text, f"{text!r} ends beyond the end of the archive")
        elif kind in (b"0", b"\0", b"7") and not text.endswith("/"):
            yield Member(text, data, size)
        if not cursor.advance_to(data + size):
            raise TarCut("truncated", text, f"{text!r} ends beyond the end of the archive")
        cursor.advance_to(data + _padded(size))


@dataclass
class Located:
    """One sample with an image: where its members lie, and their bytes when read from a stream."""

    key: str
    image_ext: str
    spans: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes
    payloads: dict[str, bytes]


@dataclass
class _Group:
    """Consecutive members of one key, as they are met."""

    key: str
    repeated_before: bool
    image_ext: str = ""
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    too_large: str = ""

    def close(self) -> Iterator[Located | Problem]:
        shown = self.key.encode("utf-8", "backslashreplace").decode()
        if not self.seen:  # nothing of ours in it
            return
        if self.repeated_before:
            yield Problem("duplicate_key", shown, "an earlier sample of the shard has this key")
        elif shown != self.key:
            yield Problem("not_utf8", shown, "the member's name is not UTF-8")
        elif not self.key.isprintable():
            yield Problem("bad_key", ascii(self.key), "the key has control characters")
        elif self.too_large:
            yield Problem("member_too_large", shown, self.too_large)
        elif not self.image_ext:
            yield Problem("no_image", shown, f"only {', '.join(sorted(self.seen))}")
        else:
            yield Located(self.key, self.image_ext, self.spans, self.payloads)
            for _ in range(max(self.seen.values()) - 1):
                yield Problem("duplicate_key", shown, "its members come more than once")


def iter_located(cursor: Cursor, *, read_payloads: bool) -> Iterator[Located | Problem]:
    """Samples of an archive in order, between them what had to be left out.

    Members of a sample follow one another, as in every WebDataset shard. Of equal keys the first
    is kept; of a damaged archive, every sample that is complete before the damage.
    """
    keys: set[str] = set()
    group: _Group | None = None
    try:
        for member in iter_members(cursor):
            match = None if _META.match(member.name) else _SPLIT.match(member.name)
            if match is None:
                continue
            key, ext = match[1], match[2].lower()
            if group is None or key != group.key:
                if group is not None:
                    yield from group.close()
                group = _Group(key, repeated_before=key in keys)
                keys.add(key)
            _add_member(group, ext, member, cursor if read_payloads else None)
    except TarCut as cut:
        match = _SPLIT.match(cut.name)
        cut_key = match[1] if match else ""
        if group is not None and group.key != cut_key:
            yield from group.close()
        yield Problem(cut.kind, cut_key.encode("utf-8", "backslashreplace").decode(), cut.cause)
        return
    if group is not None:
        yield from group.close()


def _add_member(group: _Group, ext: str, member: Member, source: Cursor | None) -> None:
    is_image = ext in IMAGE_EXTS
    if not is_image and ext not in TEXT_EXTS:
        return
    group.seen[ext] = group.seen.get(ext, 0) + 1
    if group.seen[ext] > 1 or (is_image and group.image_ext):
        return
    limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
    if member.size > limit:
        group.too_large = f"{ext} of {member.size} bytes, the limit is {limit}"
        return
    if is_image:
        group.image_ext = ext
    group.spans[ext] = (member.offset, member.size)
    if source is not None:
        payload = source.read(member.size)
        if len(payload) < member.size:
            cause = f"{member.name!r} ends beyond the end of the archive"
            raise TarCut("truncated", member.name, cause)
        group.payloads[ext] = payload


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _parse_header(block: bytes, start: int) -> tuple[bytes, int, bytes]:
    """Name, size in bytes and type flag of a ustar or GNU header."""
    try:
        checksum = int(block[148:156].strip(b" \0") or b"0", 8)
        size_field = block[124:136]
        if size_field[0] & 0x80:  # base 256, for members of 8 GiB and more
            size = int.from_bytes(size_field[1:], "big") if size_field[0] == 0x80 else -1
        else:
            size = int(size_field.strip(b" \0") or b"0", 8)
    except ValueError:
        checksum, size = -1, -1
    if size < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        kind = "truncated" if start else "not_a_tar"
        raise TarCut(kind, "", f"no tar header at byte {start}")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name, size, block[156:157]


def _parse_pax(payload: bytes, start: int) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n` of a pax extended header."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(payload) and payload[position]:
        space = payload.find(b" ", position, position + 20)
        digits = payload[position:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = payload[space + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or not equals or not record.endswith(b"\n"):
            raise TarCut("truncated", "", f"bad extended header at byte {start}")
        records[key] = value[:-1]
        position += length
    return records


def _pax_size(records: dict[bytes, bytes], start: int) -> int | None:
    size = records.get(b"size")
    if size is None:
        return None
    if not size.isdigit() or len(size) > 19:
        raise TarCut("truncated", "", f"bad extended header at byte {start}")
    return int(size)
