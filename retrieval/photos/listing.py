"""Which photos a folder holds, and how they differ from what an index holds.

Every photo is a row like a shard's sample: `shard` is the photo's own file, `offset` 0, `size` its
bytes, `key` its path within the folder. `modified` and `caption_modified` (ns) tell, with the size,
whether it is what was indexed. KEY.txt or KEY.json beside it give its caption.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from data.captions import read_captions
from data.errors import UsageError
from data.image_headers import IMAGE_EXTS
from data.problems import BadSample, add_counts
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.snapshot import Snapshot

SCHEMA = pa.schema([*METADATA_SCHEMA, ("modified", pa.int64()), ("caption_modified", pa.int64())])

State = tuple[int, int, int]
"""(bytes, modified, caption_modified): differs where a photo or its caption was changed."""


@dataclass(frozen=True)
class Photo:
    """One photo's file as it was listed."""

    path: str
    key: str  # the path within the folder
    size: int  # bytes
    modified: int  # ns
    caption_modified: int = 0  # ns, of the file of its caption; 0 where there is none

    @property
    def state(self) -> State:
        return self.size, self.modified, self.caption_modified


@dataclass(frozen=True)
class FolderDiff:
    """The difference between a folder and its index."""

    new: list[Photo] = field(default_factory=list)  # or changed
    replaced: dict[str, int] = field(default_factory=dict)  # path of a changed photo -> its old id
    gone: list[int] = field(default_factory=list)  # ids
    num_unchanged: int = 0


def list_photos(images: Path, out: Path) -> tuple[list[Photo], dict[str, int]]:
    """The photos under a folder, sorted by path, and how many files cannot be listed, by reason.

    Hidden files and folders, and `out` itself, are left out.
    """
    if not images.is_dir():
        raise UsageError(f"{images} is no folder of photos")
    photos: list[Photo] = []
    errors: dict[str, int] = {}
    for folder, inside, names in os.walk(images):
        inside[:] = [
            name
            for name in inside
            if not name.startswith(".") and Path(folder, name).absolute() != out.absolute()
        ]
        present = set(names)
        for name in names:
            if name.startswith(".") or name.rpartition(".")[2].lower() not in IMAGE_EXTS:
                continue
            path = os.path.join(folder, name)
            try:
                path.encode()
                stat = os.stat(path)
            except UnicodeEncodeError:
                add_counts(errors, {"not_utf8": 1})
            except OSError:  # a link to nowhere
                add_counts(errors, {"unreadable": 1})
            else:
                key = os.path.relpath(path, images)
                captioned = _caption_modified(folder, name, present)
                photos.append(Photo(path, key, stat.st_size, stat.st_mtime_ns, captioned))
    return sorted(photos, key=lambda photo: photo.path), errors


def _caption_modified(folder: str, name: str, present: set[str]) -> int:
    """Modification time (ns) of KEY.txt or KEY.json beside a photo; of both, their exclusive or, so
    that either change shows."""
    changed = 0
    for ext in ("txt", "json"):
        beside = f"{name.rpartition('.')[0]}.{ext}"
        if beside in present:
            with suppress(OSError):
                changed ^= os.stat(os.path.join(folder, beside)).st_mtime_ns
    return changed


def read_caption(path: Path) -> str:
    """The caption in KEY.txt or KEY.json beside the photo, "" if there is none."""
    payloads = {}
    for ext in ("txt", "json"):
        beside = path.with_suffix(f".{ext}")
        try:
            payloads[ext] = beside.read_bytes()
        except OSError:
            continue
    try:
        return read_captions(payloads)[0]
    except BadSample:
        return ""


def compare(photos: Sequence[Photo], snapshot: Snapshot) -> FolderDiff:
    """What a folder has that its index lacks, and the reverse."""
    known = _indexed(snapshot)
    new = [p for p in photos if p.path not in known or known[p.path][1] != p.state]
    listed = {photo.path for photo in photos}
    return FolderDiff(
        new,
        replaced={p.path: known[p.path][0] for p in new if p.path in known},
        gone=[id for path, (id, _) in known.items() if path not in listed],
        num_unchanged=len(photos) - len(new),
    )


def _indexed(snapshot: Snapshot) -> dict[str, tuple[int, State]]:
    """path -> (id, state) of what the index holds."""
    known: dict[str, tuple[int, State]] = {}
    names = ("shard", "id", "size", "modified", "caption_modified")
    for segment in snapshot.segments:
        alive = segment.table.filter(pa.array(segment.alive))
        columns = (alive[name].to_pylist() for name in names)
        known |= {path: (id, tuple(state)) for path, id, *state in zip(*columns, strict=True)}
    return known
