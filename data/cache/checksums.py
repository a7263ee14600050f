"""Files that are known to be whole: their size and checksum are kept beside them.

A rename makes a file appear whole or not at all to other processes, but not after a power cut, a
full disk of another kind, or a careless copy. So each shard's files in a cache are noted in
SHARD.sums.json, and a file that differs from its note counts as missing. The shard itself is noted
too: what was made of other contents is refused.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import UsageError
from data.shards.index import shard_name, write_atomically

_SHARD = "shard"  # under which a shard's own contents are noted; files have longer names


class IntactFiles:
    """The files of one shard in a cache's folder. One process at a time writes a shard's files."""

    def __init__(self, folder: Path, shard: str) -> None:
        """shard: the path of its tar."""
        self._folder, self._shard = folder, Path(shard)
        self._sums = folder / f"{shard_name(shard)}.sums.json"

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file and note it. Raises `UsageError` where the disk does not take it."""
        write_or_explain(self._folder / name, write)
        if _SHARD not in self._read():
            self._note(_SHARD, self._shard, file_digest(self._shard))
        self._note(name, self._folder / name, file_digest(self._folder / name))

    def check_shard(self) -> None:
        """Raises `UsageError` where the files were made of other contents of the shard."""
        if _SHARD in self._read() and not self._shard_is_as_noted():
            raise UsageError(
                f"the feature cache {str(self._folder)!r} was computed from other contents of "
                f"shard {str(self._shard)!r}, name another folder"
            )

    def intact(self, name: str) -> bool:
        """Whether the file is, byte for byte, as it was written: it is read through."""
        noted, path = self._read().get(name), self._folder / name
        if noted is None or not path.is_file() or path.stat().st_size != noted["size"]:
            return False
        return bool(file_digest(path) == noted["blake2b"])

    def _shard_is_as_noted(self) -> bool:
        """Read through only where its time of modification says that somebody touched it, or copied
        it without its time: a shard is a hundred times as large as what is kept of it."""
        noted, path = self._read()[_SHARD], self._shard
        if not path.is_file() or path.stat().st_size != noted["size"]:
            return False
        if path.stat().st_mtime_ns == noted["mtime_ns"]:
            return True
        if file_digest(path) != noted["blake2b"]:
            return False
        with suppress(UsageError):  # a folder that only others may write is read again next time
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
        except (FileNotFoundError, ValueError):  # then nothing counts as known
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


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's contents, hexadecimal; reads about 1 GB/s."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
