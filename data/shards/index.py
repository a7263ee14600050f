"""Parquet index of a local tar: samples and member offsets.

SHARD.index.parquet has a row per member of a good sample (`key, ext, offset, size`), in the tar's
order. Its footer records the shard's size and mtime, and counts samples and problems, so counting
reads the footer alone. A digest of the rows and one of this record tell damage: such an index is
built anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from data.errors import UsageError
from data.files import bytes_digest, cache_folder, is_intact, sealed, write_atomically
from data.image_headers import IMAGE_EXTS
from data.problems import Problem, add_counts
from data.progress import Progress
from data.shards.names import shard_name
from data.shards.tar import TarSample, iter_samples

_FORMAT = 2  # of what counts as a sample or a problem, too: 1 lost names with dots
_METADATA = b"flexilit"
# What reading a missing, damaged or foreign index raises; it is then built anew.
_UNUSABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class ShardSummary:
    """What the footer of a shard's index says."""

    num_samples: int
    problems: dict[str, int]  # bad samples found in the tar's headers, by kind
    first_problem: Problem | None
    layout: str  # digest of keys, suffixes, offsets and sizes: of two shards equal where they are


@dataclass(frozen=True)
class ShardIndex:
    """A local shard as a table: every sample that has an image, in the tar's order."""

    path: str
    keys: list[str]  # of the n samples
    starts: Int[np.ndarray, " ends"]  # (n + 1,) sample i has the rows starts[i] to starts[i + 1]
    exts: np.ndarray  # (m,) of str; one row per member
    offsets: Int[np.ndarray, " m"]  # bytes
    sizes: Int[np.ndarray, " m"]  # bytes
    summary: ShardSummary
    stamp: Mapping[str, int]  # of the shard when it was opened

    def __len__(self) -> int:
        return len(self.keys)

    def describes(self, file: BinaryIO) -> bool:
        """Whether the opened shard is the one that this index was made of."""
        return self.stamp == _stamp(file.fileno())

    def read(self, file: BinaryIO, number: int, *, pixels: bool) -> TarSample:
        """Sample `number` from the opened shard, its image's bytes only where `pixels`.

        Raises `OSError` and `EOFError` where the shard is not what it was.
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
        return TarSample(self.keys[number], image_ext, spans, payloads)


def load_index(shard: str, index_dir: str = "") -> ShardIndex:
    """The index of a local shard, built from the tar's headers when there is none that fits.

    It lies in `index_dir` where that is given, else beside the shard, or in the user's cache where
    the shard's folder cannot be written. Raises `OSError` when the shard cannot be read.
    """
    stamp = _stamp(shard)
    for path in _index_paths(shard, index_dir):
        with suppress(*_UNUSABLE), pq.ParquetFile(path) as parquet:
            summary = _parse_summary(parquet.metadata, stamp)
            table = parquet.read(use_threads=False)  # loader workers are forked
            return _from_table(shard, table, summary, stamp)
    table, summary = _build(shard, stamp)
    for path in _index_paths(shard, index_dir):
        with suppress(OSError):
            write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))
            break
    return _from_table(shard, table, summary, stamp)


def load_summaries(
    shards: Sequence[str], index_dir: str = "", rank: int = 0, world_size: int = 1
) -> list[ShardSummary]:
    """The summaries of local shards; indices that are missing are built on the way.

    Ranks start at different shards, so that together they build each index about once. A progress
    bar shows on rank 0 after five seconds. Raises `UsageError` when a shard cannot be read.
    """
    start = rank * len(shards) // world_size
    turn = list(range(start, len(shards))) + list(range(start))
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = pool.map(lambda i: _load_summary(shards[i], index_dir), turn)
        bar = Progress(results, "indexing shards", len(turn), delay=5, disable=rank != 0)
        found = dict(zip(turn, bar, strict=True))
    return [found[i] for i in range(len(shards))]


def _load_summary(shard: str, index_dir: str) -> ShardSummary:
    try:
        stamp = _stamp(shard)
        for path in _index_paths(shard, index_dir):
            with suppress(*_UNUSABLE):
                return _parse_summary(pq.read_metadata(path), stamp)
        return load_index(shard, index_dir).summary
    except OSError as error:
        raise UsageError(f"shard {shard!r} cannot be read: {error.strerror or error}") from None


def read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes of an open shard; safe in threads and forked processes, as no position moves.

    Raises `EOFError` when the file has become shorter.
    """
    data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes at {offset}")
    return data


def _stamp(shard: str | int) -> dict[str, int]:
    """`shard`: a path or the number of an opened file."""
    status = os.stat(shard)
    return {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _index_paths(shard: str, index_dir: str) -> list[Path]:
    """Where the index of a shard may lie, best place first."""
    absolute = os.path.abspath(shard)
    digest = hashlib.blake2b(os.fsencode(absolute), digest_size=8).hexdigest()
    in_cache = f"{shard_name(shard)}-{digest}.index.parquet"
    if index_dir:
        return [Path(index_dir) / in_cache]
    beside = Path(absolute).with_name(f"{shard_name(shard)}.index.parquet")
    return [beside, cache_folder("index") / in_cache]


def _build(shard: str, stamp: dict[str, int]) -> tuple[pa.Table, ShardSummary]:
    """Raises `UsageError` where the shard is written meanwhile."""
    rows: list[tuple[str, str, int, int]] = []
    summary = ShardSummary(0, {}, None, "")
    with open(shard, "rb", buffering=0) as file:
        for item in iter_samples(file, read_payloads=False):
            if isinstance(item, Problem):
                add_counts(summary.problems, {item.kind: 1})
                summary.first_problem = summary.first_problem or item
            else:
                rows.extend((item.key, ext, *span) for ext, span in item.spans.items())
                summary.num_samples += 1
        if _stamp(file.fileno()) != stamp:
            raise UsageError(f"shard {shard!r} is being written, wait until it is complete")
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    types = {"key": pa.string(), "ext": pa.string(), "offset": pa.int64(), "size": pa.int64()}
    table = pa.table([*map(list, columns)], schema=pa.schema(types.items()))
    summary.layout = _layout(table)
    record = sealed({"shard": stamp, "summary": asdict(summary)})
    return table.replace_schema_metadata({_METADATA: json.dumps(record)}), summary


def _layout(table: pa.Table) -> str:
    texts = ("\n".join(table[name].to_pylist()).encode() for name in ("key", "ext"))
    numbers = (table[name].to_numpy().tobytes() for name in ("offset", "size"))
    return bytes_digest(*texts, *numbers)


def _parse_summary(footer: pq.FileMetaData, stamp: dict[str, int]) -> ShardSummary:
    """Raises `ValueError` where the index is damaged or belongs to another state of the shard."""
    record = json.loads(footer.metadata[_METADATA])
    if not is_intact(record):
        raise ValueError("the footer is damaged, or of an earlier version")
    if record["shard"] != stamp:
        raise ValueError("the shard has changed")
    first = record["summary"].pop("first_problem")
    return ShardSummary(**record["summary"], first_problem=Problem(**first) if first else None)


def _from_table(
    shard: str, table: pa.Table, summary: ShardSummary, stamp: Mapping[str, int]
) -> ShardIndex:
    """Raises `ValueError` for a damaged table."""
    if _layout(table) != summary.layout:
        raise ValueError("the index does not hold what its footer says")
    keys = table["key"].to_pylist()
    starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
    exts = np.array(table["ext"].to_pylist(), dtype=np.str_)
    offsets, sizes = table["offset"].to_numpy(), table["size"].to_numpy()
    return ShardIndex(
        path=shard,
        keys=[keys[row] for row in starts],
        starts=np.array([*starts, len(keys)], dtype=np.int64),
        exts=exts,
        offsets=offsets,
        sizes=sizes,
        summary=summary,
        stamp=stamp,
    )
