"""Members of a tar archive in order, with damaged headers, foreign data and links told apart.

Python's tarfile finds them: in a local file it seeks from header to header and reads no content, in
a stream it reads forward.
"""

import tarfile
from collections.abc import Iterator
from typing import Any

_MAX_MEMBER = 1 << 40  # 1 TiB; a header that says more is damaged
_MAX_EXTENDED_HEADER = 1 << 20  # long names and pax records, which tarfile reads whole
_COMPRESSIONS = {  # first bytes of a file -> what it is, and the ending that says so
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"\x04\x22\x4d\x18": ("lz4", ".lz4"),
}


def compression_of(start: bytes) -> tuple[str, str] | None:
    """(name, usual ending) of the compression of a file that starts so, None for no known one."""
    return next((c for magic, c in _COMPRESSIONS.items() if start.startswith(magic)), None)


class NotATarError(tarfile.ReadError):
    """The file does not start with a tar header."""


class CompressedError(tarfile.ReadError):
    """The file is compressed, though its name does not say so."""


class TrailingDataError(tarfile.ReadError):
    """What follows an archive's end is no further archive."""


class _Header(tarfile.TarInfo):
    """tarfile's headers, where a damaged one is an error; tarfile would take it for the end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:  # type: ignore[attr-defined]
            setattr(error, "block", buf)  # noqa: B010
            raise
        if header.type in b"xgXLK" and not 0 <= header.size <= _MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(f"extended header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> "_Header":
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # at the end-of-archive marker; another archive may follow
            raise
        except (tarfile.HeaderError, ValueError, IndexError, RecursionError) as error:
            block: bytes | None = getattr(error, "block", None)  # the one that is no header
            if tar.ended and block is not None:
                if not block.strip(b"\0"):  # the file ends here, or within its padding
                    raise tarfile.EmptyHeaderError("end") from None  # type: ignore[attr-defined]
                raise TrailingDataError(f"no archive follows at byte {tar.offset}") from None
            if tar.offset == 0 and block is not None:
                if (packed := compression_of(block)) is not None:
                    raise CompressedError(
                        f"it is compressed by {packed[0]}, name it so that it ends in {packed[1]}"
                    ) from None
                raise NotATarError(f"no tar header at byte 0: {error}") from None
            raise tarfile.ReadError(f"no tar header at byte {tar.offset}: {error}") from None
        tar.ended = False
        if not 0 <= header.size <= _MAX_MEMBER:
            raise tarfile.ReadError(f"{header.name!r} has {header.size} bytes")
        return header


class _Archive(tarfile.TarFile):
    ended = False  # whether the last header was the end-of-archive marker


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


def iter_members(file: Any) -> Iterator[tarfile.TarInfo]:
    """All members but folders, in order; those of a further archive behind the first too.

    Raises `tarfile.ReadError`, or one of its kinds above, where the archive ends too early.
    """
    with _Archive.open(
        fileobj=file,
        mode="r:",
        tarinfo=_Header,
        encoding="utf-8",
        errors="surrogateescape",
        ignore_zeros=True,  # `cat a.tar b.tar`: the end of one, and then another
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if not member.isdir():
                yield member


def pass_over(file: Any, end: int) -> None:
    """Move to `end`. Raises `tarfile.ReadError` where the file ends before."""
    if file.tell() < end:
        file.seek(end - 1)
        if not file.read(1):
            raise tarfile.ReadError("the archive ends within a member")


def what_it_is(member: tarfile.TarInfo) -> str:
    """What a member is that holds no plain file's content, "" for one that does."""
    if member.islnk():
        return f"a hard link to {member.linkname!r}"
    if member.issym():
        return f"a symbolic link to {member.linkname!r}"
    if member.issparse():
        return "a sparse file"
    return "" if member.isreg() else "a special file"
