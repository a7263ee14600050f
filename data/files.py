"""This program's own files: written atomically, checksummed, cached."""

import ctypes
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder(name: str) -> Path:
    """Folder `name` of the user's cache: under `FLEXILIT_CACHE`, else ~/.cache/flexilit.

    `XDG_CACHE_HOME` takes the place of ~/.cache. The folder need not exist.
    """
    root = os.environ.get("FLEXILIT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "flexilit")
    return Path(root).expanduser() / name


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The file appears whole or not at all; of several writers at once, the last wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of a small text, which is on the disk when this returns: a power cut
    leaves the old one or the new one, and not an empty file."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())

    write_atomically(path, write)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, which takes the place of `folder` at the end.

    On failure the old one stays, as it does on a kill at any moment: on Linux the two change
    places in one call. Where the system or its file system has no such call, a kill between two
    renames leaves the old one under the name `FOLDER.old`; the next call puts it back first.
    """
    part, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        replace_folder(part, folder)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Let a folder take the place of another, which goes, or of none; as `replaced_folder`."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        shutil.rmtree(new)
    else:
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)


def link_or_copy(file: Path, to: Path) -> None:
    """A file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def _exchange(one: Path, two: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be done."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # glibc before 2.28, musl
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's contents, hexadecimal; reads about 1 GB/s."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bytes_digest(*parts: bytes) -> str:
    """BLAKE2b of bytes, one part after another, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is to become JSON, with a digest of itself by which `is_intact` tells damage."""
    return {**values, "blake2b": _json_digest(values)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether `values`, read from JSON, are as they were `sealed`; False for what was not."""
    rest = {name: value for name, value in values.items() if name != "blake2b"}
    return values.get("blake2b") == _json_digest(rest)


def _json_digest(values: Mapping[str, Any]) -> str:
    return bytes_digest(json.dumps(values, sort_keys=True).encode())
