"""Building an index in Milvus, and changing it.

Embeddings lie in a folder, which any number of machines may have written; one program pushes them.
An image is written with its metadata to the collection of each patch size, coarse ones first; ids
are those that a folder's index would give, so a push that was interrupted is repeated over itself.
The manifest, replaced at the end, says up to which id images count: those beyond are what an
interrupted push has left, which nobody finds, and the next change deletes them.
"""

import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import UsageError
from data.progress import Progress
from retrieval.detail import coarse_first, of_manifest
from retrieval.embed.manifest import check_shards, read_manifest
from retrieval.index.build import find_model, new_manifest, read_addition
from retrieval.index.choose import HNSW_LINKS, num_lists
from retrieval.index.config import IndexType, IndexTypeChoice
from retrieval.index.create import HNSW_BUILD
from retrieval.index.manifest import IndexManifest
from retrieval.index.row_sources import (
    RowSource,
    blocks,
    cast_to_schema,
    embedded_partitions,
    index_schema,
)
from retrieval.index.segments import checked_vectors
from retrieval.milvus.address import MilvusAddress
from retrieval.milvus.catalogue import Catalogue, Lease, is_catalogue, properties, properties_of
from retrieval.milvus.client import VECTOR, MilvusConnection, as_ids
from retrieval.milvus.expressions import quoted
from retrieval.milvus.fields import Columns

BATCH_BYTES = 8 << 20  # of one call; Milvus takes 64 MB
SPANS = 500  # of ids, kept to draw from
LISTS = 128  # at least; what Milvus Lite 3.2.2 has, which misses what pymilvus 3.0.2 asks for
SHARDS_AT_ONCE = 50  # whose images are looked up together
_TYPES: dict[str, IndexType] = {"auto": "hnsw", "hnsw": "hnsw", "flat": "flat", "ivf": "ivf"}


def build_in_milvus(
    embeddings_dir: str | Path,
    address: MilvusAddress,
    model_dir: str | Path = "",
    index_type: IndexTypeChoice = "auto",
) -> str:
    """`build_index`, into Milvus. Returns the reason for the index type.

    Raises `UsageError` as it does, for a type that Milvus Lite and clusters do not both have, and
    while another program builds it; `IndexUnavailable` where Milvus does not answer. What an
    interrupted build has left is replaced.
    """
    embeddings = Path(embeddings_dir)
    if index_type not in _TYPES:
        raise UsageError(f"index_type {index_type!r} in Milvus: allowed are {', '.join(_TYPES)}")
    source = read_manifest(embeddings)
    sources = embedded_partitions(embeddings, source)
    if not sources:
        raise UsageError(f"{embeddings} holds no image, so there is nothing to index")
    check_shards(embeddings, source)
    model = str(model_dir or source["model"])
    find_model(model, source)
    manifest = new_manifest(
        source["image_fingerprint"], source["text_fingerprint"], source["width"],
        of_manifest(source), index_type=index_type, device="cpu", fit=source.get("fit"),
    )  # fmt: skip
    return rows_to_milvus(address, model, manifest, sources)


def rows_to_milvus(
    address: MilvusAddress, model: str, manifest: IndexManifest, sources: Sequence[RowSource]
) -> str:
    """`build_in_milvus` from any source of rows. manifest: of `new_manifest`."""
    count = sum(part.count for part in sources)
    type_, why = _TYPES[manifest.asked_type], "as asked"
    if manifest.asked_type == "auto":
        why = "Milvus Lite and clusters have it"
    manifest = replace(
        manifest,
        index_type=type_,
        reason=f"{type_}: {why}",
        unknown={"nlist": max(LISTS, num_lists(count)), "build": uuid.uuid4().hex},
    )
    ((first, *_),) = blocks(sources, 0, 1)
    columns = Columns(index_schema(first.metadata(0, 1)))
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    connection = MilvusConnection(address)
    catalogue = _new_catalogue(connection, address, columns, model, manifest)
    with catalogue.only_writer() as lease:
        for name in catalogue.collections(manifest):
            if connection.describe(name) is not None:
                connection.drop(name)
            connection.create(
                name, columns.scalars, manifest.width, _vector_index(manifest),
                properties(manifest, model),
            )  # fmt: skip
        spans = _push(catalogue, lease, manifest, sources, "indexing")
        lease.commit(_grown(manifest, count, spans))
    return manifest.reason


def add_to_milvus(address: MilvusAddress, embeddings_dir: str | Path) -> int:
    """`add_embeddings`, into Milvus. Returns how many images. Raises as `build_in_milvus`."""
    embeddings, catalogue = Path(embeddings_dir), _open(address)
    source = read_addition(embeddings, catalogue.read(), str(address))
    with catalogue.only_writer() as lease:
        manifest = _tidied(catalogue, lease, catalogue.read(strong=True))
        held = _held(catalogue, manifest, sorted({p["shard"] for p in source["partitions"]}))
        sources = embedded_partitions(embeddings, source, manifest.next_id, held)
        if not sources and source["partitions"]:
            raise UsageError(f"{address} holds the images of {embeddings} already")
        count = sum(part.count for part in sources)
        if count:
            spans = _push(catalogue, lease, manifest, sources, "adding")
            lease.commit(_grown(manifest, count, spans))
    return count


def delete_in_milvus(address: MilvusAddress, ids: Sequence[int]) -> int:
    """`delete_ids`, in Milvus. Returns how many of them the index held."""
    catalogue = _open(address)
    with catalogue.only_writer() as lease:
        before = catalogue.read(strong=True)
        manifest = _tidied(catalogue, lease, before)
        *others, last = catalogue.collections(manifest)
        asked = sorted({id for id in ids if 0 <= id < manifest.next_id})
        held = as_ids(catalogue.connection.get(last, asked, [], strong=True))
        for collection in (*others, last):
            lease.check()
            catalogue.connection.delete(collection, held.tolist())
        left = manifest.count - len(held)
        if left != before.count:
            lease.commit(replace(manifest, count=left, generation=manifest.generation + 1))
    return len(held)


def _open(address: MilvusAddress) -> Catalogue:
    catalogue = Catalogue.open(MilvusConnection(address), address)
    catalogue.load()
    return catalogue


def _new_catalogue(
    connection: MilvusConnection,
    address: MilvusAddress,
    columns: Columns,
    model: str,
    manifest: IndexManifest,
) -> Catalogue:
    """In place of what an interrupted build has left. Raises `UsageError` for another collection of
    a name that is needed."""
    for name in (address.name, *map(address.collection, manifest.patch_sizes)):
        found = connection.describe(name)
        is_ours = found is not None and "format" in properties_of(found)
        if found and not (is_ours and is_catalogue(found) == (name == address.name)):
            raise UsageError(f"{address}: there is a collection {name} already; give another name")
    if connection.describe(address.name) is not None:
        before = Catalogue.open(connection, address)
        if before.is_complete():
            raise UsageError(f"{address} exists already; give another name, or drop it first")
        with before.only_writer():
            connection.drop(address.name)
    return Catalogue.create(connection, address, columns, model, manifest)


def _vector_index(manifest: IndexManifest) -> dict[str, Any]:
    """The index of vectors as Milvus spells it."""
    type_ = manifest.index_type
    params = {
        "flat": {}, "ivf": {"nlist": manifest.unknown["nlist"]},
        "hnsw": {"M": HNSW_LINKS, "efConstruction": HNSW_BUILD},
    }[type_]  # fmt: skip
    return {"index_type": {"ivf": "IVF_FLAT"}.get(type_, type_.upper()), "params": params}


def _push(
    catalogue: Catalogue,
    lease: Lease,
    manifest: IndexManifest,
    sources: Sequence[RowSource],
    what: str,
) -> list[tuple[int, int]]:
    """Write all rows to all collections. Returns the spans of their ids."""
    count, sizes = sum(part.count for part in sources), manifest.patch_sizes
    spans: list[tuple[int, int]] = []
    with Progress(total=count * len(sizes), desc=what, unit="vec", leave=False, delay=1) as bar:
        for source, table, start in _batches(sources, manifest.width, catalogue.columns.schema):
            ids = table["id"].to_numpy()
            if (np.diff(ids) <= 0).any() or (spans and ids[0] <= spans[-1][1]):
                raise UsageError("the ids of the metadata do not ascend; embed these shards again")
            spans.append((int(ids[0]), int(ids[-1])))
            rows = catalogue.columns.encode(table)
            for size in coarse_first(sizes):
                vectors = source.vectors(size, start, start + len(table))
                for row, vector in zip(
                    rows, checked_vectors(vectors, manifest.width, size), strict=True
                ):
                    row[VECTOR] = vector
                lease.check()
                catalogue.connection.write(catalogue.address.collection(size), rows)
                bar.update(len(rows))
    for collection in catalogue.collections(manifest):
        catalogue.connection.flush(collection)
        catalogue.connection.load(collection)
    return spans


def _batches(
    sources: Sequence[RowSource], width: int, schema: pa.Schema
) -> Iterator[tuple[RowSource, pa.Table, int]]:
    """(source, some of its rows' metadata, number of the first of them)."""
    count = sum(part.count for part in sources)
    for source, start, stop in blocks(sources, 0, count):
        table = cast_to_schema(source.metadata(start, stop), schema)
        row_bytes = 4 * width + 2 * table.nbytes // len(table)  # texts twice
        size = max(1, BATCH_BYTES // row_bytes)
        for first in range(0, len(table), size):
            yield source, table.slice(first, size), start + first


def _grown(manifest: IndexManifest, count: int, spans: list[tuple[int, int]]) -> IndexManifest:
    """The manifest with so many more images."""
    known = [*map(tuple, manifest.unknown.get("spans", [])), *spans]
    if len(known) > SPANS:
        known = sorted(random.Random(0).sample(known, SPANS))
    return replace(
        manifest,
        count=manifest.count + count,
        generation=manifest.generation + 1,
        next_id=spans[-1][1] + 1,
        unknown={**manifest.unknown, "spans": known},
    )


def _tidied(catalogue: Catalogue, lease: Lease, manifest: IndexManifest) -> IndexManifest:
    """Without what interrupted changes have left: images that were never counted are deleted, and
    deleted ones not counted."""
    connection, names = catalogue.connection, catalogue.collections(manifest)
    for name in names:
        for batch in connection.iterate(name, f"id >= {manifest.next_id}", [], strong=True):
            lease.check()
            connection.delete(name, as_ids(batch).tolist())
    return replace(manifest, count=connection.count(names[-1], strong=True))


def _held(
    catalogue: Catalogue, manifest: IndexManifest, shards: Sequence[str]
) -> list[tuple[pa.Table, np.ndarray]]:
    """What tells images of these shards that the index holds, as `embedded_partitions` takes it."""
    columns, last = catalogue.columns, catalogue.collections(manifest)[-1]
    names = ["shard", "key", "offset", "size", "digest"]
    fields = [columns.fields[name] for name in names]
    held = []
    for first in range(0, len(shards), SHARDS_AT_ONCE):
        some = ", ".join(map(quoted, shards[first : first + SHARDS_AT_ONCE]))
        where = f"{columns.fields['shard']} in [{some}]"
        for batch in catalogue.connection.iterate(last, where, fields, strong=True):
            held.append((columns.table(batch, names), np.ones(len(batch), bool)))
    return held
