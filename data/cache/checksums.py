"""Checksums of a cache's files, by which damaged ones are noticed.

An atomic rename does not protect a file from a power cut, a failing disk or an interrupted copy. So
SHARD.sums.json holds size, time and checksum of each file made from a shard; a file that differs
counts as missing. It holds the shard's own too: files made from other contents are refused.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import UsageError
from data.files import file_digest, write_atomically
from data.shards.names import shard_name

_SHARD = "shard"  # the entry of the shard itself; no file of a cache has this name


class IntactFiles:
    """The files made from one shard in a cache's folder. At most one process writes them."""

    def __init__(self, folder: Path, shard: str) -> None:
        """shard: the path of its tar."""
        self._folder, self._shard = folder, Path(shard)
        self._sums = folder / f"{shard_name(shard)}.sums.json"

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file and its checksum. Raises `UsageError` where the disk does not take it."""
        write_or_explain(self._folder / name, write)
        if _SHARD not in self._read():
            self._note(_SHARD, self._shard, file_digest(self._shard))
        self._note(name, self._folder / name, file_digest(self._folder / name))

    def check_shard(self) -> None:
        """Raises `UsageError` where the files were made from other contents of the shard."""
        if _SHARD in self._read() and not self._shard_is_as_noted():
            raise UsageError(
                f"the feature cache {str(self._folder)!r} was computed from other contents of "
                f"shard {str(self._shard)!r}, name another folder"
            )

    def intact(self, name: str) -> bool:
        """Whether the file is as it was written; reads all of it."""
        noted, path = self._read().get(name), self._folder / name
        if noted is None or not path.is_file() or path.stat().st_size != noted["size"]:
            return False
        return bool(file_digest(path) == noted["blake2b"])

    def _shard_is_as_noted(self) -> bool:
        """Rehash the shard only if its mtime changed: it is ~100x the size of its features."""
        noted, path = self._read()[_SHARD], self._shard
        if not path.is_file() or path.stat().st_size != noted["size"]:
            return False
        if path.stat().st_mtime_ns == noted["mtime_ns"]:
            return True
        if file_digest(path) != noted["blake2b"]:
            return False
        with suppress(UsageError):  # in a read-only folder it is read again next time
            self._note(_SHARD, path, noted["blake2b"])
        return True

    def _note(self, name: str, path: Path, digest: str) -> None:
        status = path.stat()
        entry = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "blake2b": digest}
        text = json.dumps(self._read() | {name: entry}, indent=1) + "\n"
        write_or_explain(self._sums, lambda file: file.write(text.encode()))

    def _read(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._sums.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # then every file counts as missing
            return {}
        return noted if isinstance(noted, dict) else {}


def write_or_explain(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write_atomically`; `UsageError` where the disk does not take it."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); what is complete stays "
            "and is used again, so mend that and start again"
        ) from error
