"""This program's own files: written atomically, checksummed, cached."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's contents, hexadecimal; reads about 1 GB/s."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
