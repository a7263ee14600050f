"""What a shard is told by, so that another one under its name is noticed.

A local file: by size and time of its last change; where only the time differs, as a copy's does, by
its BLAKE2b. A remote one: by the tag or checksum that its store gives it, else by the time of its
last change, else by its size alone. What a program writes (`pipe:`) cannot be told.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import file_digest

# What stores call the tag, checksum or time of an object, the most telling first.
_TAGS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "checksum", "LastModified", "Last-Modified",
    "last_modified", "mtime", "updated", "created",
)  # fmt: skip

Identity = dict[str, Any]
"""size (bytes); of a local file mtime_ns and perhaps blake2b, of a remote one perhaps tag. Empty:
nothing is known."""


def stamp(shard: str) -> Identity:
    """What is known of a shard without reading it. Raises `OSError` where a local one is gone."""
    if shard.startswith("pipe:"):
        return {}
    if "://" in shard:
        return _remote(shard)
    status = os.stat(shard)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def identity(shard: str) -> Identity:
    """`stamp`, and of a local file the digest; reads about 1 GB/s."""
    known = stamp(shard)
    return {**known, "blake2b": file_digest(Path(shard))} if "mtime_ns" in known else known


def confirm(shard: str, noted: Mapping[str, Any]) -> Identity | None:
    """What to note of a shard from now on where it is still the one noted; None where it is not.

    Reads a local file whose time alone differs. Nothing noted, or a remote shard of which nothing
    is known, counts as the same. Raises `OSError` where a local one is gone.
    """
    now = stamp(shard) if noted else {}
    shared = now.keys() & noted.keys()
    if all(now[name] == noted[name] for name in shared):
        return dict(noted)
    if "blake2b" not in noted or now.get("size") != noted.get("size"):
        return None
    now["blake2b"] = file_digest(Path(shard))
    return now if now["blake2b"] == noted["blake2b"] else None


def _remote(shard: str) -> Identity:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(shard)
        facts = fs.info(path)
    except Exception:  # whatever a store raises; reading the shard will say more
        return {}
    tag = next((f"{name} {facts[name]}" for name in _TAGS if facts.get(name)), "")
    size = facts.get("size")
    return {**({} if size is None else {"size": size}), **({"tag": tag} if tag else {})}
