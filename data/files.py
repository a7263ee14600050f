"""This program's own files: written atomically, checksummed, cached."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

from data.errors import UsageError


def cache_folder(name: str) -> Path:
    """Folder `name` of the user's cache: under `FLEXILIT_CACHE`, else ~/.cache/flexilit.

    `XDG_CACHE_HOME` takes the place of ~/.cache. The folder need not exist.
    """
    root = os.environ.get("FLEXILIT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "flexilit")
    return Path(root).expanduser() / name


def check_there(folder: str | Path) -> None:
    """Raises `UsageError` where there is no such folder."""
    if not Path(folder).is_dir():
        raise UsageError(f"there is no folder {folder}")


def make_folder(path: str | Path) -> None:
    """Create the folder that a program writes; `UsageError` where it cannot be written in."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out {path} cannot be a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"out {path} cannot be written in")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The file appears whole or not at all; of several writers at once, the last wins.

    A process's first write in a folder removes what killed writers left there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(4096)
def _sweep(folder: Path) -> None:
    """Remove temporary files whose writer is gone: nobody holds their lock, which goes with its
    process. A writer locks its file at once, but those of the last seconds are left alone."""
    names: list[str] = []
    with suppress(OSError):  # a folder that may be written in, but not listed
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    for name in names:
        with suppress(OSError), open(folder / name, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime > 5:
                (folder / name).unlink()


_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}")


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` of a small text, which is on the disk when this returns: a power cut
    leaves the old one or the new one, and not an empty file."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())

    write_atomically(path, write)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON file in place of the one there, as `write_text_atomically`."""
    write_text_atomically(file, json.dumps(value, indent=2) + "\n")


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


def load_array(file: Path | BytesIO, mapped: bool = False) -> Any:
    """An array of numpy's format, memory-mapped where asked. Raises `OSError` or `ValueError`."""
    import numpy as np

    try:
        return np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (TokenError, SyntaxError, EOFError) as error:  # its header is read as Python
        raise ValueError(f"damaged: {error}") from None


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
    as_read = json.loads(json.dumps(values))  # numbers that are keys become texts, sorted as such
    return {**values, "blake2b": _json_digest(as_read)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether `values`, read from JSON, are as they were `sealed`; False for what was not."""
    rest = {name: value for name, value in values.items() if name != "blake2b"}
    return values.get("blake2b") == _json_digest(rest)


def check_seal(file: Path, values: Mapping[str, Any]) -> None:
    """Raises `UsageError` where JSON is not as it was `sealed`; what was not counts as intact."""
    if "blake2b" in values and not is_intact(values):
        raise UsageError(
            f"{file} is damaged or was edited: its blake2b is that of other values; without that "
            "entry it is used as it is"
        )


def _json_digest(values: Mapping[str, Any]) -> str:
    return bytes_digest(json.dumps(values, sort_keys=True).encode())
