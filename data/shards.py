"""Shards: which ones a pattern names, and the index that makes a tar a random-access table."""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from jaxtyping import Int
from tqdm import tqdm

from data.errors import UsageError
from data.problems import Problem, add_counts
from data.tar import (
    IMAGE_EXTS,
    LocalCursor,
    Located,
    StreamCursor,
    iter_located,
    read_at,
)

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
_GLOB = frozenset("*?[")
_FORMAT = 1
_METADATA = b"flexilit"
# What reading a missing, damaged or foreign index raises; it is then built anew.
_UNUSABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError)
TEXT_COLUMNS = ("txt", "json", "cls")


def is_local(url: str) -> bool:
    """True for a plain tar on this machine's file systems: one that can be read at random."""
    return "://" not in url and not url.startswith("pipe:") and not url.endswith(_COMPRESSED)


def shard_name(url: str) -> str:
    """The name that files derived from a shard start with: its file name without `.tar`."""
    return url.rstrip("/").rsplit("/", 1)[-1].removesuffix(".tar")


def expand_shards(patterns: Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Shards that the patterns name: braces, then globs, here or anywhere fsspec reaches.

    Order: as the patterns come, sorted within a glob; a shard named twice counts once. Raises
    `UsageError` when a pattern matches nothing or starts a program that nobody allowed.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith("pipe:") and not allow_pipe:
            raise UsageError(
                f"shard {pattern!r} runs a program, which only --data.allow_pipe allows"
            )
        found.update(dict.fromkeys(_expand(pattern)))
    if not found:
        raise UsageError("no shards were given, name at least one tar")
    return list(found)


def _expand(pattern: str) -> Iterator[str]:
    if pattern.startswith("file://"):
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
    try:
        fs, path = fsspec.core.url_to_fs(name)
        if "::" in name or not _GLOB & set(path):
            return [name]
        return sorted(fs.unstrip_protocol(match) for match in fs.glob(path))
    except (ImportError, ValueError) as error:
        raise UsageError(f"shard {name!r} cannot be opened: {error}") from None


@dataclass(frozen=True)
class Summary:
    """What the footer of a shard's index says."""

    num_samples: int
    problems: dict[str, int]  # bad samples found in the tar's headers, by kind
    first_problem: Problem | None


@dataclass
class ShardIndex:
    """A local shard as a table: every sample that has an image, in the tar's order."""

    path: str
    keys: list[str]
    image_exts: list[str]
    image_offset: Int[np.ndarray, " n"]  # bytes
    image_size: Int[np.ndarray, " n"]  # bytes
    text_offset: Int[np.ndarray, "n 3"]  # per TEXT_COLUMNS, bytes, -1 where there is none
    text_size: Int[np.ndarray, "n 3"]  # bytes
    summary: Summary

    @property
    def problems(self) -> dict[str, int]:
        """Samples left out of the table, by kind."""
        return self.summary.problems

    def __len__(self) -> int:
        return len(self.keys)


def load_index(shard: str, cache_dir: str = "") -> ShardIndex:
    """The index of a local shard, built from the tar's headers when there is none that fits.

    It lies beside the shard, or under `cache_dir`, or where the shard's folder cannot be written
    under ~/.cache/flexilit/index. Raises `OSError` when the shard cannot be read.
    """
    stamp = _stamp(shard)
    for path in _index_paths(shard, cache_dir):
        with suppress(*_UNUSABLE):
            with pq.ParquetFile(path) as parquet:
                table = parquet.read(use_threads=False)  # loader workers are forked
            summary = _parse_summary(table.schema.metadata, stamp)
            if summary is not None:
                return _from_table(shard, table, summary, stamp["size"])
    table, summary = _build(shard, stamp)
    for path in _index_paths(shard, cache_dir):
        if _write_atomically(table, path):
            break
    return _from_table(shard, table, summary, stamp["size"])


def load_summaries(
    shards: Sequence[str], cache_dir: str = "", rank: int = 0, world_size: int = 1
) -> list[Summary]:
    """The summaries of local shards; indices that are missing are built on the way.

    Ranks start at different shards, so that together they build each index about once. A progress
    bar shows on rank 0 after five seconds. Raises `UsageError` when a shard cannot be read.
    """
    start = rank * len(shards) // world_size
    turn = list(range(start, len(shards))) + list(range(start))
    found: dict[int, Summary] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = pool.map(lambda i: _load_summary(shards[i], cache_dir), turn)
        bar = tqdm(results, "indexing shards", len(turn), delay=5, disable=rank != 0)
        for i, summary in zip(turn, bar, strict=True):
            found[i] = summary
    return [found[i] for i in range(len(shards))]


def _load_summary(shard: str, cache_dir: str) -> Summary:
    try:
        stamp = _stamp(shard)
        for path in _index_paths(shard, cache_dir):
            with suppress(*_UNUSABLE):
                summary = _parse_summary(pq.read_metadata(path).metadata, stamp)
                if summary is not None:
                    return summary
        return load_index(shard, cache_dir).summary
    except OSError as error:
        raise UsageError(f"shard {shard!r} cannot be read: {error.strerror or error}") from None


def open_shard(url: str, allow_pipe: bool = False) -> Any:
    """A shard as a file object of tar bytes to read, decompressed by its name's ending."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise UsageError(f"shard {url!r} runs a program, which only --data.allow_pipe allows")
        from webdataset.gopen import gopen  # its import costs seconds

        return gopen(url)
    return fsspec.open(url, "rb", compression="infer").open()


def iter_stream(url: str, allow_pipe: bool = False) -> Iterator[Located | Problem]:
    """Samples of a shard read forward, with their bytes. Raises what the file system raises."""
    with open_shard(url, allow_pipe) as file:
        yield from iter_located(StreamCursor(file), read_payloads=True)
        if url.startswith("pipe:"):  # the padding after the end marker, or the program complains
            for _ in range(64):
                if not file.read(1 << 16):
                    break


def read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes of an open shard; safe in threads and forked processes, as no position moves.

    Raises `EOFError` when the file has become shorter.
    """
    data = read_at(file.fileno(), offset, size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes at {offset}")
    return data


def _stamp(shard: str) -> dict[str, int]:
    status = os.stat(shard)
    return {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _index_paths(shard: str, cache_dir: str) -> list[Path]:
    """Where the index of a shard may lie, best place first."""
    absolute = os.path.abspath(shard)
    digest = hashlib.blake2b(os.fsencode(absolute), digest_size=8).hexdigest()
    in_cache = f"{shard_name(shard)}-{digest}.index.parquet"
    if cache_dir:
        return [Path(cache_dir) / in_cache]
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    beside = Path(absolute).with_name(f"{shard_name(shard)}.index.parquet")
    return [beside, home_cache / "flexilit" / "index" / in_cache]


def _build(shard: str, stamp: dict[str, int]) -> tuple[pa.Table, Summary]:
    rows: list[tuple[str, str, int, int]] = []
    problems: dict[str, int] = {}
    first: Problem | None = None
    num_samples = 0
    with open(shard, "rb", buffering=0) as file:
        for item in iter_located(LocalCursor(cast(BinaryIO, file)), read_payloads=False):
            if isinstance(item, Problem):
                add_counts(problems, {item.kind: 1})
                first = first or item
            else:
                rows.extend((item.key, ext, *span) for ext, span in item.spans.items())
                num_samples += 1
    summary = Summary(num_samples, problems, first)
    record = stamp | {
        "samples": num_samples,
        "problems": problems,
        "first_problem": [first.kind, first.key, first.cause] if first else None,
    }
    key, ext, offset, size = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = pa.table(
        {
            "key": pa.array(key, pa.string()),
            "ext": pa.array(ext, pa.string()),
            "offset": pa.array(offset, pa.int64()),
            "size": pa.array(size, pa.int64()),
        }
    )
    return table.replace_schema_metadata({_METADATA: json.dumps(record)}), summary


def _write_atomically(table: pa.Table, path: Path) -> bool:
    """False where it cannot be written. Of several writers at once, any one wins: all are equal."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def _parse_summary(metadata: dict[bytes, bytes] | None, stamp: dict[str, int]) -> Summary | None:
    """None where the index belongs to another state of the shard, or to no shard of ours."""
    record = json.loads((metadata or {}).get(_METADATA, b"{}"))
    if any(record.get(name) != value for name, value in stamp.items()):
        return None
    first = record["first_problem"]
    return Summary(record["samples"], record["problems"], Problem(*first) if first else None)


def _from_table(shard: str, table: pa.Table, summary: Summary, shard_size: int) -> ShardIndex:
    """Raises `ValueError` for a table that this shard cannot have."""
    key, ext = table["key"].to_pylist(), table["ext"].to_pylist()
    offset, size = table["offset"].to_numpy(), table["size"].to_numpy()
    if len(offset) and (offset.min() < 0 or size.min() < 0 or (offset + size).max() > shard_size):
        raise ValueError("the index points outside its shard")
    count = summary.num_samples
    keys: list[str] = []
    image_exts: list[str] = []
    image = np.zeros((count, 2), dtype=np.int64)
    text = np.full((count, len(TEXT_COLUMNS), 2), -1, dtype=np.int64)
    for row, (this_key, this_ext) in enumerate(zip(key, ext, strict=True)):
        if not keys or this_key != keys[-1]:
            keys.append(this_key)
            image_exts.append("")
        if len(keys) > count:
            break
        if this_ext in IMAGE_EXTS:
            image_exts[-1] = this_ext
            image[len(keys) - 1] = offset[row], size[row]
        else:
            text[len(keys) - 1, TEXT_COLUMNS.index(this_ext)] = offset[row], size[row]
    if len(keys) != count or not all(image_exts):
        raise ValueError("the index does not hold what its footer says")
    return ShardIndex(
        path=shard,
        keys=keys,
        image_exts=image_exts,
        image_offset=image[:, 0],
        image_size=image[:, 1],
        text_offset=text[:, :, 0],
        text_size=text[:, :, 1],
        summary=summary,
    )
