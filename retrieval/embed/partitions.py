"""The files of bulk embeddings, in clip-retrieval's layout, so its tools and autofaiss read them.

OUT/patch_28/img_emb/img_emb_0000.npy      (n, d) float32, unit norm; one partition per shard
OUT/tokens_64/img_emb/img_emb_0000.npy     or by budgets of tokens
OUT/metadata/metadata_0000.parquet         id, key, caption, shard, offset, size, digest
OUT/manifest.json                          written last, see `manifest.py`

The footer of the metadata holds what was skipped, what the shard was told by, and the vectors'
digests.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from data.batch import EvalBatch
from data.errors import UsageError
from data.files import file_digest, load_array
from data.shards.identity import Identity
from retrieval.detail import Detail, folder_name

METADATA_SCHEMA = pa.schema(
    {
        "id": pa.int64(),  # shard number << 32 | sample number in the shard: needs no counting
        "key": pa.string(),
        "caption": pa.string(),  # the first of the sample's captions, "" without any
        "shard": pa.string(),
        "offset": pa.int64(),  # of the image's bytes in the shard
        "size": pa.int64(),  # bytes
    }
)
DIGEST = pa.field("digest", pa.int64())  # `image_digest` of the image's bytes; 0.1.0 had none
ROW_GROUP = 16_384
OWN_COLUMNS = frozenset({*METADATA_SCHEMA.names, DIGEST.name})
_SCHEMA = METADATA_SCHEMA.append(DIGEST)
_FACTS = ("errors", "identity", "blake2b")  # in the footer


def metadata_file(folder: Path, number: int) -> Path:
    """Where the metadata of partition `number` lies. Its presence marks the partition complete."""
    return folder / "metadata" / f"metadata_{number:04d}.parquet"


def vector_file(folder: Path, patch_size: Detail, number: int) -> Path:
    """Where the vectors of partition `number` at `patch_size` lie."""
    return folder / folder_name(patch_size) / "img_emb" / f"img_emb_{number:04d}.npy"


def partition_files(folder: Path, patch_sizes: Iterable[Detail], number: int) -> dict[str, Path]:
    """The files of partition `number`, the metadata last."""
    vectors = {folder_name(size): vector_file(folder, size, number) for size in patch_sizes}
    return {**vectors, "metadata": metadata_file(folder, number)}


@dataclass(frozen=True)
class PartitionFacts:
    """What the footer of a partition's metadata says."""

    count: int  # images
    errors: dict[str, int]  # what was skipped, by kind
    identity: Identity  # of the shard; empty in a partition by 0.1.0
    blake2b: dict[str, str]  # of the vectors, by patch size as in `partition_files`


def read_facts(folder: Path, number: int) -> PartitionFacts | None:
    """The facts of a partition, None where it is not complete."""
    try:
        footer = pq.read_metadata(metadata_file(folder, number))
        values = [json.loads(footer.metadata.get(name.encode(), b"{}")) for name in _FACTS]
    except (OSError, pa.ArrowException, ValueError):
        return None
    return PartitionFacts(footer.num_rows, *values)


def open_vectors(folder: Path, patch_size: Detail, number: int) -> Float[np.ndarray, "n d"]:
    """The vectors of one partition, memory-mapped. Raises `UsageError` for a damaged file."""
    file = vector_file(folder, patch_size, number)
    try:
        vectors: np.ndarray = load_array(file, mapped=True)
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ValueError(f"{vectors.dtype} of shape {vectors.shape}")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} is missing or damaged ({error}); embed these shards again"
        ) from error
    return vectors


def read_metadata(folder: Path, number: int) -> pa.Table:
    """The metadata of one partition. Raises `UsageError` for a damaged file."""
    file = metadata_file(folder, number)
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{file} is missing or damaged ({error}); embed these shards again"
        ) from error


class _NpyWriter:
    """Rows appended to an .npy file; the header, of fixed length, is rewritten at the end."""

    def __init__(self, file: Path, width: int) -> None:
        self.width, self.rows = width, 0
        self.out = open(file, "wb")  # noqa: SIM115
        self._header()

    def _header(self) -> None:
        self.out.seek(0)
        shape = (self.rows, self.width)
        np.lib.format.write_array_header_1_0(
            self.out, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )

    def add(self, rows: Float[np.ndarray, "b d"]) -> None:
        self.out.write(np.ascontiguousarray(rows, "<f4").data)
        self.rows += len(rows)

    def close(self) -> None:
        if not self.out.closed:
            self._header()
            self.out.close()


class PartitionWriter:
    """One shard's vectors and metadata under temporary names; `finish` gives them their own.

    The metadata is renamed last: where it exists, the partition is complete.
    """

    def __init__(
        self, out: Path, number: int, shard: str, patch_sizes: Sequence[Detail], width: int
    ) -> None:
        self.number, self.shard = number, shard
        self.vector_files = {size: vector_file(out, size, number) for size in patch_sizes}
        self.metadata_file = metadata_file(out, number)
        self.vectors = {
            size: _NpyWriter(_part(file), width) for size, file in self.vector_files.items()
        }
        self.metadata = pq.ParquetWriter(_part(self.metadata_file), _SCHEMA)
        self.waiting: list[pa.RecordBatch] = []

    def add(self, batch: EvalBatch, embeds: Mapping[Detail, Float[np.ndarray, "b d"]]) -> None:
        """The next rows of the shard."""
        for size, writer in self.vectors.items():
            writer.add(embeds[size])
        columns = {
            "id": (self.number << 32) + np.asarray(batch.indices, np.int64),
            "key": batch.keys,
            "caption": [captions[0] if captions else "" for captions in batch.captions],
            "shard": [self.shard] * len(batch.keys),
            "offset": np.asarray(batch.offsets, np.int64),
            "size": np.asarray(batch.sizes, np.int64),
            "digest": np.asarray(batch.digests, np.int64),
        }
        self.waiting.append(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))
        if sum(map(len, self.waiting)) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.metadata.write_table(pa.Table.from_batches(self.waiting))
            self.waiting = []

    def finish(self, errors: Mapping[str, int], identity: Identity) -> None:
        """Write what is left and rename. errors: unreadable images of this shard, by kind.
        identity: what the shard is told by."""
        self._flush()
        for writer in self.vectors.values():
            writer.close()
        digests = {
            folder_name(size): file_digest(_part(file)) for size, file in self.vector_files.items()
        }
        facts = (dict(errors), identity, digests)
        self.metadata.add_key_value_metadata(
            {name: json.dumps(value) for name, value in zip(_FACTS, facts, strict=True)}
        )
        self.metadata.close()
        for file in [*self.vector_files.values(), self.metadata_file]:
            _part(file).replace(file)

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.metadata.close()
        for writer in self.vectors.values():
            writer.close()


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")
