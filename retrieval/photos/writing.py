"""Photos on their way into an index: embedded, or with the vectors of contents that it holds."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from contrastive.model.lit import LitModel
from data.batch import batch_pixels
from retrieval.detail import Detail
from retrieval.embed.encode import embed_pixels
from retrieval.index.build import change_index
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.photos.changes import own_schema
from retrieval.photos.exif import Exif
from retrieval.photos.reading import LoadedPhoto


class Waiting:
    """Photos with vectors between two writes, and the ids that they replace."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._clear()

    def _clear(self) -> None:
        self.replaced: list[int] = []
        self.rows: list[LoadedPhoto] = []
        self.embeds: dict[Detail, list[np.ndarray]] = {
            size: [] for size in self._snapshot.patch_sizes
        }

    @property
    def num_seen(self) -> int:
        return max(len(self.rows), len(self.replaced))

    def add(self, model: LitModel, batch: Sequence[LoadedPhoto]) -> None:
        """Photos with pixels, which are embedded, or with known contents."""
        new = [loaded for loaded in batch if loaded.pixels is not None]
        if new:
            pixels = batch_pixels([p for loaded in new if (p := loaded.pixels) is not None])
            for size, rows_at in embed_pixels(model, pixels, [*self.embeds]).items():
                self.embeds[size].append(rows_at)
            self.rows += [replace(loaded, pixels=None) for loaded in new]
        ids = [id for loaded in batch if (id := loaded.known) is not None]
        if ids:
            for size, embeds in self.embeds.items():
                embeds.append(self._snapshot.vectors(ids, size))
            known = [loaded for loaded in batch if loaded.known is not None]
            rows = self._snapshot.rows(ids)
            self.rows += [
                replace(loaded, digest=row.get("digest") or 0, exif=_exif_of(row))
                for loaded, row in zip(known, rows, strict=True)
            ]

    def write(self, out: Path) -> None:
        """Add them to the index, in one step with the deletion of what they replace."""
        vectors = {size: np.concatenate(rows) for size, rows in self.embeds.items() if rows}
        schema = own_schema(self._snapshot)
        change_index(out, self.replaced, lambda first: _rows(first, self.rows, vectors, schema))
        self._clear()


def _exif_of(row: Mapping[str, Any]) -> Exif:
    return Exif(**{field.name: row.get(field.name) for field in fields(Exif)})


def _rows(
    first_id: int,
    rows: Sequence[LoadedPhoto],
    vectors: Mapping[Detail, np.ndarray],
    schema: pa.Schema,
) -> list[RowsInMemory]:
    photos = [row.photo for row in rows]
    by_time = "digest" not in schema.names
    columns: dict[str, Any] = {
        "id": first_id + np.arange(len(rows), dtype=np.int64),
        "key": [photo.key for photo in photos],
        "caption": [row.caption for row in rows],
        "shard": [photo.path for photo in photos],
        "offset": np.zeros(len(rows), np.int64),
        "size": [photo.size for photo in photos],
        "modified": [photo.modified for photo in photos],
        "caption_modified": [photo.captions_state(by_time) for photo in photos],
        "digest": [row.digest for row in rows],
        "folder": [os.path.dirname(photo.key) for photo in photos],
        "file": [os.path.basename(photo.key) for photo in photos],
    }
    for field in fields(Exif):
        columns[field.name] = [getattr(row.exif, field.name) for row in rows]
    columns = {name: columns[name] for name in schema.names}
    return [RowsInMemory(vectors, pa.Table.from_pydict(columns, schema=schema))]
