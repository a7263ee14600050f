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
from data.shards.identity import Identity, confirm, identity
from data.shards.names import shard_name

_SHARD = "shard"  # the entry of the shard itself; no file of a cache has this name
_ENTRY = {"size", "mtime_ns", "blake2b"}


class IntactFiles:
    """The files made from one shard in a cache's folder. At most one process writes them."""

    def __init__(self, folder: Path, shard: str) -> None:
        """shard: the path of its tar."""
        self._folder, self._shard = folder, Path(shard)
        self._sums = folder / f"{shard_name(shard)}.sums.json"

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file and its checksum. Raises `UsageError` where the disk does not take it, and
        as `check_shard`."""
        self.check_shard()
        write_or_explain(self._folder / name, write)
        if _SHARD not in self._read():
            self._note(_SHARD, identity(str(self._shard)))
        self._note(name, identity(str(self._folder / name)))

    def check_shard(self) -> None:
        """Raises `UsageError` where the files were made from other contents of the shard."""
        noted = self._read().get(_SHARD)
        if noted is None:
            return
        found = confirm(str(self._shard), noted) if self._shard.is_file() else None
        if found is None:
            raise UsageError(
                f"the feature cache {str(self._folder)!r} was computed from other contents of "
                f"shard {str(self._shard)!r}, name another folder"
            )
        if found != noted:
            with suppress(UsageError):  # in a read-only folder it is read again next time
                self._note(_SHARD, found)

    def intact(self, name: str) -> bool:
        """Whether the file is as it was written; reads all of it."""
        noted, path = self._read().get(name), self._folder / name
        if noted is None or not path.is_file() or path.stat().st_size != noted["size"]:
            return False
        return bool(file_digest(path) == noted["blake2b"])

    def _note(self, name: str, entry: Identity) -> None:
        text = json.dumps(self._read() | {name: entry}, indent=1) + "\n"
        write_or_explain(self._sums, lambda file: file.write(text.encode()))

    def _read(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._sums.read_text(encoding="utf-8"))
            return {name: entry for name, entry in noted.items() if entry.keys() >= _ENTRY}
        except (FileNotFoundError, ValueError, AttributeError):  # then every file counts as missing
            return {}


def write_or_explain(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write_atomically`; `UsageError` where the disk does not take it."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); what is complete stays "
            "and is used again, so mend that and start again"
        ) from error
