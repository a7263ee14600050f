"""Samples of a tar archive: where each one lies, and what is wrong with the rest.

Python's tarfile finds the members: in a local file it seeks from header to header and reads no
image, in a stream it reads forward. One parser for both gives a shard the same samples, numbers and
problems either way.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.problems import Problem

IMAGE_EXTS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
TEXT_EXTS = frozenset({"txt", "json", "cls"})
# A member is read whole, so these limit the memory that a header can ask for.
MAX_IMAGE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24

_MAX_MEMBER = 1 << 40  # 1 TiB; a header that says more is damaged
_MAX_EXTENDED_HEADER = 1 << 20  # long names and pax records, which tarfile reads whole
_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's rule for KEY.ext
_META = re.compile(r"__[^/]*__($|/)")  # webdataset skips these too


class _NotATar(tarfile.ReadError):
    """The file does not start with a tar header."""


class _Header(tarfile.TarInfo):
    """tarfile's headers, where a damaged one is an error; tarfile would take it for the end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in b"xgXLK" and not 0 <= header.size <= _MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(f"extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the end-of-archive marker
        except (tarfile.HeaderError, ValueError, IndexError, RecursionError) as error:
            invalid = isinstance(error, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]
            first = tar.fileobj is not None and tar.fileobj.tell() == tarfile.BLOCKSIZE
            kind = _NotATar if invalid and first else tarfile.ReadError
            raise kind(f"no tar header at byte {tar.offset}: {error}") from None
        if not 0 <= header.size <= _MAX_MEMBER:
            raise tarfile.ReadError(f"{header.name!r} has {header.size} bytes")
        return header


class ForwardFile:
    """A stream that can seek forward, by reading, which is all that tarfile needs."""

    def __init__(self, file: Any) -> None:
        """`file`: anything with `read(size)`; fsspec's and webdataset's files are no `BinaryIO`."""
        self._file = file
        self._position = 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        parts, left = [], size
        while left and (part := self._file.read(min(left, 1 << 22))):
            parts.append(part)
            left -= len(part)
        self._position += size - left
        return b"".join(parts)

    def seek(self, position: int) -> None:
        """To `position`, or to the end where that comes first."""
        while self._position < position and self.read(min(position - self._position, 1 << 20)):
            pass


@dataclass
class TarSample:
    """One sample with an image: where its members lie, and those of their bytes that were read."""

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

    def add(self, ext: str, member: tarfile.TarInfo) -> bool:
        """Whether the member is one to read."""
        is_image = ext in IMAGE_EXTS
        if not is_image and ext not in TEXT_EXTS:
            return False
        self.seen[ext] = self.seen.get(ext, 0) + 1
        if self.seen[ext] > 1 or (is_image and self.image_ext):
            return False
        limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
        if member.size > limit:
            self.too_large = f"{ext} of {member.size} bytes, the limit is {limit}"
            return False
        if is_image:
            self.image_ext = ext
        self.spans[ext] = (member.offset_data, member.size)
        return True

    def close(self) -> Iterator[TarSample | Problem]:
        shown = _shown(self.key)
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
            yield TarSample(self.key, self.image_ext, self.spans, self.payloads)
            for _ in range(max(self.seen.values()) - 1):
                yield Problem("duplicate_key", shown, "its members come more than once")


def iter_samples(file: Any, *, read_payloads: bool) -> Iterator[TarSample | Problem]:
    """Samples of an archive in order, between them what had to be left out.

    `file`: open at its start; a `ForwardFile` or an unbuffered file. Members of a sample follow
    one another, as in every WebDataset shard. Of equal keys the first is kept; of a damaged
    archive, every sample that is complete before the damage.
    """
    keys: set[str] = set()
    group: _Group | None = None
    open_key = ""  # of the member whose data are being passed
    try:
        for member in _iter_members(file):
            match = None if _META.match(member.name) else _SPLIT.match(member.name)
            if match is not None:
                key, ext = match[1], match[2].lower()
                if group is None or key != group.key:
                    if group is not None:
                        yield from group.close()
                    group = _Group(key, repeated_before=key in keys)
                    keys.add(key)
                open_key = key
                if group.add(ext, member) and read_payloads:
                    group.payloads[ext] = file.read(member.size)
            _pass(file, member.offset_data + member.size)
            open_key = ""
    except tarfile.ReadError as error:
        if group is not None and group.key != open_key:
            yield from group.close()
        kind = "not_a_tar" if isinstance(error, _NotATar) else "truncated"
        yield Problem(kind, _shown(open_key), str(error))
    else:
        if group is not None:
            yield from group.close()


def _iter_members(file: Any) -> Iterator[tarfile.TarInfo]:
    """Regular files in order. Raises `tarfile.ReadError` where the archive ends too early."""
    with tarfile.open(
        fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.isreg() and not member.issparse():
                yield member


def _pass(file: Any, end: int) -> None:
    """Move to `end`. Raises `tarfile.ReadError` where the file ends before."""
    if file.tell() < end:
        file.seek(end - 1)
        if not file.read(1):
            raise tarfile.ReadError("the archive ends within a member")


def _shown(key: str) -> str:
    return key.encode("utf-8", "backslashreplace").decode()
