"""How a folder of photos differs from what its index holds.

Every photo is a row like a shard's sample: `key` is its path within the folder, `shard` its own
file, `offset` 0, `size` its bytes; `EXIF_COLUMNS` say where it lies in the folder, and when, where
and with what it was taken (null where it does not say). With the size, `modified` (ns) and
`caption_modified` (of `Photo.captions_state`) tell whether it is what was indexed, and `digest`,
where they differ, whether its contents still are.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data.shards.location import image_digest
from retrieval.embed.partitions import DIGEST, METADATA_SCHEMA
from retrieval.index.snapshot import Snapshot
from retrieval.photos.listing import Listing, Photo, is_left_out

SCHEMA_0_1 = pa.schema(
    [*METADATA_SCHEMA, ("modified", pa.int64()), ("caption_modified", pa.int64())]
)
EXIF_COLUMNS = pa.schema(
    [
        ("folder", pa.string()),  # within the folder of photos, "" for what lies in it itself
        ("file", pa.string()),  # its name
        ("taken", pa.string()),  # as ISO 8601 writes it, so that texts compare as dates do
        ("latitude", pa.float64()),
        ("longitude", pa.float64()),
        ("camera", pa.string()),
    ]
)
SCHEMA = pa.schema([*SCHEMA_0_1, DIGEST, *EXIF_COLUMNS])
MAX_COMPARED = 100  # photos that are read to know a folder again


@dataclass(frozen=True)
class Changes:
    """The difference between a folder and its index."""

    new: list[Photo] = field(default_factory=list)  # or changed
    replaced: dict[str, int] = field(default_factory=dict)  # key of a changed photo -> its old id
    same_file: dict[str, int] = field(default_factory=dict)  # of these, where only captions differ
    gone: list[int] = field(default_factory=list)  # ids
    kept: dict[int, str] = field(default_factory=dict)  # id -> folder that shows no photo any more
    num_unchanged: int = 0


class Row(NamedTuple):
    """What an index says of a photo."""

    id: int
    size: int
    modified: int
    captions: int
    digest: int | None = None

    def is_file_of(self, photo: Photo) -> bool:
        return (self.size, self.modified) == (photo.size, photo.modified)


def compare(listing: Listing, snapshot: Snapshot, prune: bool = False) -> Changes:
    """What a folder has that its index lacks, and the reverse.

    A photo is gone where its folder still shows others, and kept where the folder shows none (it
    may be a drive that is unplugged) or the file cannot be looked at. prune: all are gone.
    """
    by_time = is_older(snapshot)
    known = dict(_rows(snapshot))
    changes = Changes()
    listed, folders = set(), set()
    unchanged = 0
    for photo in listing.photos:
        listed.add(photo.key)
        folders.add(os.path.dirname(photo.key))
        row = known.get(photo.key)
        if row and row.is_file_of(photo):
            if row.captions == photo.captions_state(by_time):
                unchanged += 1
                continue
            changes.same_file[photo.key] = row.id
        if row:
            changes.replaced[photo.key] = row.id
        changes.new.append(photo)
    for key, row in known.items():
        if key not in listed:
            folder = os.path.dirname(key)
            may_be_back = folder not in folders or key in listing.unreadable
            if may_be_back and not prune and not is_left_out(key):
                changes.kept[row.id] = folder
            else:
                changes.gone.append(row.id)
    return Changes(**{**vars(changes), "num_unchanged": unchanged})


def is_older(snapshot: Snapshot) -> bool:
    """Whether an index has no digests, as those of 0.1.0."""
    return snapshot.columns is not None and DIGEST.name not in snapshot.columns.names


def own_schema(snapshot: Snapshot) -> pa.Schema:
    """Of the rows that an index takes: those of earlier versions have fewer columns."""
    held = SCHEMA if snapshot.columns is None else snapshot.columns
    return pa.schema([field for field in SCHEMA if field.name in held.names])


def known_contents(snapshot: Snapshot, photos: Iterable[Photo]) -> dict[int, int]:
    """digest -> id of what the index holds, of files as long as some of `photos`."""
    contents: dict[int, int] = {}
    if not is_older(snapshot):
        sizes = pa.array({photo.size for photo in photos}, pa.int64())
        for segment in snapshot.segments:
            wanted = pc.is_in(segment.table["size"], sizes)
            table = segment.table.filter(pc.and_(wanted, pa.array(segment.alive)))
            contents |= zip(table[DIGEST.name].to_pylist(), table["id"].to_pylist(), strict=True)
    return {digest: id for digest, id in contents.items() if digest}


def is_same_folder(listing: Listing, snapshot: Snapshot) -> bool:
    """Whether at least half of an index's photos lie in a folder under the same keys, by their
    contents: of some photos, spread evenly."""
    photos = {photo.key: photo for photo in listing.photos}
    rows = list(_rows(snapshot))
    compared = rows[:: -(-len(rows) // MAX_COMPARED) or 1]
    same = sum(_has_contents_of(row, photos.get(key)) for key, row in compared)
    return 2 * same >= len(compared)


def _has_contents_of(row: Row, photo: Photo | None) -> bool:
    if photo is None or row.size != photo.size:
        return False
    try:
        contents = row.digest and image_digest(Path(photo.path).read_bytes())
        return row.is_file_of(photo) or bool(contents and contents == row.digest)
    except OSError:
        return False


def _rows(snapshot: Snapshot) -> Iterator[tuple[str, Row]]:
    """By key."""
    names = ["key", "id", "size", "modified", "caption_modified"]
    names += [] if is_older(snapshot) else [DIGEST.name]
    for segment in snapshot.segments:
        alive = segment.table.select(names).filter(pa.array(segment.alive))
        for key, *values in zip(*(alive[name].to_pylist() for name in names), strict=True):
            row = Row(*values)
            if row.modified is not None:  # of photos, not of embeddings that were added
                yield key, row
