"""The names of shards: which tars a pattern stands for, and how each can be read.

Light, so that a program can answer a wrong path before it imports anything heavy.
"""

import glob
import os
from collections.abc import Iterator, Sequence

from braceexpand import braceexpand

from data.errors import UsageError, check_utf8

_COMPRESSED = (
    ".gz", ".tgz", ".bz2", ".tbz2", ".tbz", ".xz", ".txz", ".lzma", ".zst", ".tzst", ".lz4",
)  # fmt: skip
_GLOB = frozenset("*?[")


def is_local(shard: str) -> bool:
    """True for a plain tar on this machine's file systems: one that can be read at random."""
    return not ("://" in shard or shard.startswith("pipe:") or is_compressed(shard))


def is_compressed(shard: str) -> bool:
    """Whether the name says that the tar is compressed."""
    return shard.lower().endswith(_COMPRESSED)


def shard_name(shard: str) -> str:
    """The name that files derived from a shard start with: its file name without `.tar`."""
    return shard.rstrip("/").rsplit("/", 1)[-1].removesuffix(".tar")


def expand_shards(patterns: Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Shards that the patterns name: braces, then globs, here or anywhere fsspec reaches.

    Order: as the patterns come, sorted within a glob; a shard named twice counts once. Raises
    `UsageError` when a pattern matches nothing or what is not UTF-8, or runs a program without
    `allow_pipe`.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        check_pipe(pattern, allow_pipe)
        found.update(dict.fromkeys(_expand(pattern)))
    if not found:
        raise UsageError("no shards were given, name at least one tar")
    check_utf8(*found)
    return list(found)


def check_told_apart(shards: Sequence[str]) -> None:
    """Raises `UsageError` for shards that files derived from them cannot be kept for: streams, and
    two of one file name."""
    by_name: dict[str, str] = {}
    for shard in shards:
        if not is_local(shard):
            raise UsageError(f"features are cached for local tars only, {shard!r} is a stream")
        if by_name.setdefault(shard_name(shard), shard) != shard:
            raise UsageError(
                f"shards {by_name[shard_name(shard)]!r} and {shard!r} have the same file name, "
                "which a feature cache cannot tell apart, rename one"
            )


def check_pipe(shard: str, allow_pipe: bool) -> None:
    """Raises `UsageError` for webdataset's `pipe:COMMAND` unless it is allowed."""
    if shard.startswith("pipe:") and not allow_pipe:
        raise UsageError(f"shard {shard!r} runs a program, which only data.allow_pipe allows")


def _expand(pattern: str) -> Iterator[str]:
    pattern = pattern.removeprefix("file://")
    if os.path.isfile(pattern):  # a real name may contain braces and brackets
        yield pattern
        return
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise UsageError(f"shard pattern {pattern!r} cannot be expanded: {error}") from None
    for name in names:
        matches = _matches(name)
        if not matches:
            of = "" if name == pattern else f" (of {pattern!r})"
            raise UsageError(f"no shard matches {name!r}{of}, name existing tars")
        yield from matches


def _matches(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if "://" not in name:
        if os.path.isfile(name):
            return [name]
        paths = glob.glob(os.path.expanduser(name), recursive=True)
        return sorted(path for path in paths if os.path.isfile(path))
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(name)
        if "::" in name or not _GLOB & set(path):
            return [name]
        return sorted(fs.unstrip_protocol(match) for match in fs.glob(path))
    except (ImportError, ValueError) as error:
        raise UsageError(f"shard {name!r} cannot be opened: {error}") from None
