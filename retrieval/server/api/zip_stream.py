"""A ZIP archive that is sent while it is made."""

import io
import zipfile


class ZipStream:
    """Files are added uncompressed, as images are compressed already; no two of one name."""

    def __init__(self) -> None:
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(self._sink, "w", zipfile.ZIP_STORED)
        self._names: set[str] = set()  # lower case: some file systems know no other

    def add(self, name: str, data: bytes) -> None:
        """A file; one of a name that is taken becomes `name (2).jpg`."""
        stem, dot, suffix = name.rpartition(".")
        if not stem:
            stem, suffix = name, ""
        number, free = 1, name
        while free.lower() in self._names:
            number += 1
            free = f"{stem} ({number}){dot if suffix else ''}{suffix}"
        self._names.add(free.lower())
        self._zip.writestr(free, data)

    def take(self) -> bytes:
        """What has not been taken of the archive."""
        return self._sink.take()

    def end(self) -> bytes:
        """The rest of it, table of contents included."""
        self._zip.close()
        return self.take()


class _Sink(io.RawIOBase):
    """Is written to once, from start to end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def flush(self) -> None:
        """Nothing to do, even of a download that was left, whose sink may be closed before it."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken
