"""Shards: which ones a pattern names, and the index that makes a tar a random-access table."""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from jaxtyping import Int
from tqdm import tqdm

from data.errors import UsageError
from data.problems import Problem, add_counts
from data.shards.tar import IMAGE_EXTS, ForwardFile, Located, iter_located

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
_GLOB = frozenset("*?[")
_FORMAT = 1
_METADATA = b"flexilit"
# What reading a missing, damaged or foreign index raises; it is then built anew.
_UNUSABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError)


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
        _check_pipe(pattern, allow_pipe)
        found.update(dict.fromkeys(_expand(pattern)))
    if not found:
        raise UsageError("no shards were given, name at least one tar")
    return list(found)


def _check_pipe(url: str, allow_pipe: bool) -> None:
    if url.startswith("pipe:") and not allow_pipe:
        raise UsageError(f"shard {url!r} runs a program, which only --data.allow_pipe allows")


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
    try:
        fs, path = fsspec.core.url_to_fs(name)
        if "::" in name or not _GLOB & set(path):
            return [name]
        return sorted(fs.unstrip_protocol(match) for match in fs.glob(path))
    except (ImportError, ValueError) as error:
        raise UsageError(f"shard {name!r} cannot be opened: {error}") from None


@dataclass
class Summary:
    """What the footer of a shard's index says."""

    num_samples: int
    problems: dict[str, int]  # bad samples found in the tar's headers, by kind
    first_problem: Problem | None


@dataclass(frozen=True)
class ShardIndex:
    """A local shard as a table: every sample that has an image, in the tar's order."""

    path: str
    keys: list[str]  # of the n samples
    starts: Int[np.ndarray, " ends"]  # (n + 1,) sample i has the rows starts[i] to starts[i + 1]
    exts: np.ndarray  # (m,) of str; one row per member
    offsets: Int[np.ndarray, " m"]  # bytes
    sizes: Int[np.ndarray, " m"]  # bytes
    summary: Summary

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, file: BinaryIO, number: int, *, pixels: bool) -> Located:
        """Sample `number` from the opened shard, its image's bytes only where `pixels`.

        Raises `OSError`, `EOFError` and `IndexError` where the shard is not what it was.
        """
        spans = {
            str(self.exts[row]): (int(self.offsets[row]), int(self.sizes[row]))
            for row in range(self.starts[number], self.starts[number + 1])
        }
        image_ext = next(ext for ext in spans if ext in IMAGE_EXTS)
        payloads = {
            ext: read_member(file, *span)
            for ext, span in spans.items()
            if pixels or ext != image_ext
        }
        return Located(self.keys[number], image_ext, spans, payloads)


def load_index(shard: str, cache_dir: str = "") -> ShardIndex:
    """The index of a local shard, built from the tar's headers when there is none that fits.

    It lies beside the shard, or under `cache_dir`, or where the shard's folder cannot be written
    under ~/.cache/flexilit/index. Raises `OSError` when the shard cannot be read.
    """
    stamp = _stamp(shard)
    for path in _index_paths(shard, cache_dir):
        with suppress(*_UNUSABLE), pq.ParquetFile(path) as parquet:
            summary = _parse_summary(parquet.metadata, stamp)
            table = parquet.read(use_threads=False)  # loader workers are forked
            return _from_table(shard, table, summary, stamp["size"])
    table, summary = _build(shard, stamp)
    for path in _index_paths(shard, cache_dir):
        with suppress(OSError):
            write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))
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
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = pool.map(lambda i: _load_summary(shards[i], cache_dir), turn)
        bar = tqdm(results, "indexing shards", len(turn), delay=5, disable=rank != 0)
        found = dict(zip(turn, bar, strict=True))
    return [found[i] for i in range(len(shards))]


def _load_summary(shard: str, cache_dir: str) -> Summary:
    try:
        stamp = _stamp(shard)
        for path in _index_paths(shard, cache_dir):
            with suppress(*_UNUSABLE):
                return _parse_summary(pq.read_metadata(path), stamp)
        return load_index(shard, cache_dir).summary
    except OSError as error:
        raise UsageError(f"shard {shard!r} cannot be read: {error.strerror or error}") from None


def open_shard(url: str, allow_pipe: bool = False) -> Any:
    """A shard as a file object of tar bytes to read, decompressed by its name's ending."""
    _check_pipe(url, allow_pipe)
    if url.startswith("pipe:"):
        from webdataset.gopen import gopen  # its import costs seconds

        return gopen(url)
    return fsspec.open(url, "rb", compression="infer").open()


def iter_stream(url: str, allow_pipe: bool = False) -> Iterator[Located | Problem]:
    """Samples of a shard read forward, with their bytes. Raises what the file system raises."""
    with open_shard(url, allow_pipe) as file:
        yield from iter_located(ForwardFile(file), read_payloads=True)
        if url.startswith("pipe:"):  # the padding after the end marker, or the program complains
            for _ in range(64):
                if not file.read(1 << 16):
                    break


def read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes of an open shard; safe in threads and forked processes, as no position moves.

    Raises `EOFError` when the file has become shorter.
    """
    data = os.pread(file.fileno(), size, offset)
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
    summary = Summary(0, {}, None)
    with open(shard, "rb", buffering=0) as file:
        for item in iter_located(file, read_payloads=False):
            if isinstance(item, Problem):
                add_counts(summary.problems, {item.kind: 1})
                summary.first_problem = summary.first_problem or item
            else:
                rows.extend((item.key, ext, *span) for ext, span in item.spans.items())
                summary.num_samples += 1
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    types = {"key": pa.string(), "ext": pa.string(), "offset": pa.int64(), "size": pa.int64()}
    table = pa.table([*map(list, columns)], schema=pa.schema(types.items()))
    record = {"shard": stamp, "summary": asdict(summary)}
    return table.replace_schema_metadata({_METADATA: json.dumps(record)}), summary


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


def _parse_summary(footer: pq.FileMetaData, stamp: dict[str, int]) -> Summary:
    """Raises `ValueError` where the index belongs to another state of the shard."""
    record = json.loads(footer.metadata[_METADATA])
    if record["shard"] != stamp:
        raise ValueError("the shard has changed")
    first = record["summary"].pop("first_problem")
    return Summary(**record["summary"], first_problem=Problem(**first) if first else None)


def _from_table(shard: str, table: pa.Table, summary: Summary, shard_size: int) -> ShardIndex:
    """Raises `ValueError` for a table that this shard cannot have."""
    keys = table["key"].to_pylist()
    starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
    exts = np.array(table["ext"].to_pylist(), dtype=np.str_)
    offsets, sizes = table["offset"].to_numpy(), table["size"].to_numpy()
    images = int(np.isin(exts, list(IMAGE_EXTS)).sum())
    if not len(starts) == images == summary.num_samples:
        raise ValueError("the index does not hold what its footer says")
    if min(offsets.min(initial=0), sizes.min(initial=0)) < 0 or (
        (offsets + sizes).max(initial=0) > shard_size
    ):
        raise ValueError("the index points outside its shard")
    return ShardIndex(
        path=shard,
        keys=[keys[row] for row in starts],
        starts=np.array([*starts, len(keys)], dtype=np.int64),
        exts=exts,
        offsets=offsets,
        sizes=sizes,
        summary=summary,
    )
