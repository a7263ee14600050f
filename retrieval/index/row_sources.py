"""Rows on their way into an index: metadata and vectors, read block by block."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from data.errors import UsageError
from data.files import file_digest
from retrieval.detail import Detail, folder_name, said
from retrieval.embed.partitions import (
    DIGEST,
    METADATA_SCHEMA,
    OWN_COLUMNS,
    metadata_file,
    open_vectors,
    read_metadata,
    vector_file,
)

BLOCK_ROWS = 65_536  # vectors in memory at a time: 100 MB at width 384


@runtime_checkable
class RowSource(Protocol):
    """Rows with an id each, ascending, and a vector per patch size."""

    count: int

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        """Rows start to stop, unit norm, float32."""

    def metadata(self, start: int, stop: int) -> pa.Table:
        """Rows start to stop: the columns of `METADATA_SCHEMA`, and perhaps others."""


class EmbeddedPartition:
    """One partition of a folder that `embed_shards` wrote."""

    def __init__(
        self,
        folder: Path,
        number: int,
        count: int,
        first_id: int = 0,
        blake2b: Mapping[str, str] | None = None,
    ) -> None:
        """first_id: is added to the ids that the folder gives. blake2b: of its files, by which
        damaged ones are noticed."""
        self.folder, self.number, self.count, self.first_id = folder, number, count, first_id
        self._unchecked = dict(blake2b or {})
        self._table: pa.Table | None = None

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        self._check(folder_name(patch_size), vector_file(self.folder, patch_size, self.number))
        vectors = open_vectors(self.folder, patch_size, self.number)
        if len(vectors) != self.count:
            raise UsageError(
                f"partition {self.number} of {self.folder} has {len(vectors)} vectors at "
                f"{said(patch_size)} for {self.count} rows; embed these shards again"
            )
        return np.ascontiguousarray(vectors[start:stop], np.float32)

    def metadata(self, start: int, stop: int) -> pa.Table:
        table = self._table if self._table is not None else self._read()
        # Forgotten after its last rows: there may be thousands of shards.
        self._table = table if stop < self.count else None
        return table.slice(start, stop - start)

    def _read(self) -> pa.Table:
        self._check("metadata", metadata_file(self.folder, self.number))
        table = read_metadata(self.folder, self.number)
        if len(table) != self.count:
            raise UsageError(
                f"{metadata_file(self.folder, self.number)} has {len(table)} rows for "
                f"{self.count} vectors; embed these shards again"
            )
        ids = pa.array(table["id"].to_numpy() + self.first_id)
        return table.set_column(table.schema.get_field_index("id"), "id", ids)

    def _check(self, name: str, file: Path) -> None:
        """Read a file whole before its first use. Raises `UsageError` for a damaged one."""
        noted = self._unchecked.pop(name, None)
        if noted is not None and file.is_file() and file_digest(file) != noted:
            raise UsageError(f"{file} is damaged; embed these shards again")


class _SomeRows:
    """Some rows of another source."""

    def __init__(self, source: RowSource, rows: Int[np.ndarray, " n"]) -> None:
        """rows: ascending."""
        self._source, self._rows, self.count = source, rows, len(rows)

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        first, wanted, end = self._span(start, stop)
        return self._source.vectors(patch_size, first, end)[wanted]

    def metadata(self, start: int, stop: int) -> pa.Table:
        first, wanted, end = self._span(start, stop)
        return self._source.metadata(first, end).take(pa.array(wanted))

    def _span(self, start: int, stop: int) -> tuple[int, Int[np.ndarray, " n"], int]:
        """Which of the source's rows hold rows start to stop: first, places from there on, end."""
        wanted = self._rows[start:stop]
        return int(wanted[0]), wanted - wanted[0], int(wanted[-1]) + 1


def embedded_partitions(
    embeddings: Path,
    source: Mapping[str, Any],
    first_id: int = 0,
    held: Sequence[tuple[pa.Table, Bool[np.ndarray, " _"]]] = (),
) -> list[RowSource]:
    """The rows of a folder that `embed_shards` wrote, each image once, by partition.

    source: its manifest. held: metadata of an index, and which rows of it count: their images are
    left out. An image is known by its shard, key and place, and its digest where both have one.
    """
    listed = [partition["shard"] for partition in source["partitions"]]
    shards = pa.array(sorted(set(listed)), pa.string())
    met: dict[int, int] = {}
    for table, alive in held:
        known = pc.and_(pc.is_in(table["shard"], shards), pa.array(alive))
        met.update(_images(table.filter(known)))
    partitions: list[RowSource] = []
    for number, partition in enumerate(source["partitions"]):
        blake2b = partition.get("blake2b", {})
        rows: RowSource = EmbeddedPartition(
            embeddings, number, partition["count"], first_id, blake2b
        )
        if rows.count and (met or len(shards) < len(listed)):
            images = _images(rows.metadata(0, rows.count))
            new = [n for n, image in enumerate(images) if not _is_met(image, met)]
            met.update(images)
            if len(new) < rows.count:
                rows = _SomeRows(rows, np.array(new, np.int64))
        if rows.count:
            partitions.append(rows)
    return partitions


def _images(table: pa.Table) -> list[tuple[int, int]]:
    """Of each row, a number for where its image lies, equal within a process where that is, and its
    digest, 0 where it has none."""
    columns = (table[name].to_pylist() for name in ("shard", "key", "offset", "size"))
    places = map(hash, zip(*columns, strict=True))
    has_digests = DIGEST.name in table.column_names
    digests = table[DIGEST.name].fill_null(0).to_pylist() if has_digests else [0] * len(table)
    return list(zip(places, digests, strict=True))


def _is_met(image: tuple[int, int], met: Mapping[int, int]) -> bool:
    place, digest = image
    return place in met and (met[place] == digest or 0 in (met[place], digest))


class RowsInMemory:
    """Rows that are added to an index at once."""

    def __init__(
        self, vectors: Mapping[Detail, Float[np.ndarray, "n d"]], metadata: pa.Table
    ) -> None:
        """vectors: per patch size, unit norm."""
        self._vectors, self._metadata, self.count = vectors, metadata, len(metadata)

    def vectors(self, patch_size: Detail, start: int, stop: int) -> Float[np.ndarray, "n d"]:
        return np.ascontiguousarray(self._vectors[patch_size][start:stop], np.float32)

    def metadata(self, start: int, stop: int) -> pa.Table:
        return self._metadata.slice(start, stop - start)


def blocks(
    sources: Sequence[RowSource], start: int, stop: int
) -> Iterator[tuple[RowSource, int, int]]:
    """Rows start to stop of the sources one after another: (source, its rows from, to), at most
    BLOCK_ROWS each."""
    first = 0
    for source in sources:
        low, high = max(start - first, 0), min(stop - first, source.count)
        for at in range(low, high, BLOCK_ROWS):
            yield source, at, min(at + BLOCK_ROWS, high)
        first += source.count


def index_schema(table: pa.Table) -> pa.Schema:
    """The schema of an index whose first rows are `table`. Raises `UsageError` where a column of
    `METADATA_SCHEMA` is missing."""
    missing = [name for name in METADATA_SCHEMA.names if name not in table.column_names]
    if missing:
        raise UsageError(f"the metadata has no column {missing[0]!r}; embed these shards again")
    others = [field for field in table.schema if field.name not in OWN_COLUMNS]
    return pa.schema([*METADATA_SCHEMA, DIGEST, *(pa.field(f.name, f.type) for f in others)])


def cast_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of an index; nulls where it has none. Raises `UsageError` for a
    column that the index does not have, or values that its column cannot hold. An index by 0.1.0
    has no digests, and gets none."""
    if DIGEST.name not in schema.names and DIGEST.name in table.column_names:
        table = table.drop_columns(DIGEST.name)
    unknown = set(table.column_names) - set(schema.names)
    if unknown:
        raise UsageError(
            f"the index has no column {sorted(unknown)[0]!r}; its columns are "
            f"{', '.join(schema.names)}"
        )
    missing = {
        field.name: pa.nulls(len(table), field.type)
        for field in schema
        if field.name not in table.column_names
    }
    for name, nulls in missing.items():
        table = table.append_column(name, nulls)
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UsageError(f"the metadata does not fit the index: {error}") from error
