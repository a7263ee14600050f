"""From a folder of pictures to a searchable index, and again when the folder has changed.

Every picture is a row like a shard's sample: `shard` is the picture's own file, `offset` 0, `size`
its bytes, `key` its path within the folder; `modified` and `caption_modified` (ns) tell, with the
size, whether it is what was indexed. KEY.txt or KEY.json beside it give its caption. Work is kept
every CHUNK pictures, so an interrupted run goes on where it was, and what is done can be searched
meanwhile.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from contrastive.model.lit import LitModel
from data.captions import read_captions
from data.config import OnError
from data.errors import UsageError
from data.images import ImageTransform, decode_image
from data.problems import BadSample, Problem, SampleError, add_counts
from data.shards.tar import IMAGE_EXTS
from retrieval.embed.bulk import check_batches, check_patch_sizes
from retrieval.embed.partitions import METADATA_SCHEMA
from retrieval.index.build import change_index, compact_index, index_pieces
from retrieval.index.create import IndexKind
from retrieval.index.gpus import Device
from retrieval.index.manifest import LATENCY_MS
from retrieval.index.row_sources import Rows
from retrieval.index.snapshot import Snapshot

CHUNK = 8192  # pictures between two writes
COMPACT_ABOVE = 0.2  # share of the index that was added or deleted since it was last merged
MAX_PIXELS = 100_000_000
SCHEMA = pa.schema([*METADATA_SCHEMA, ("modified", pa.int64()), ("caption_modified", pa.int64())])


@dataclass(frozen=True)
class Photo:
    """One picture's file as it was listed."""

    path: str
    key: str  # the path within the folder
    size: int  # bytes
    modified: int  # ns
    caption_modified: int = 0  # ns, of the file of its caption; 0 where there is none

    @property
    def state(self) -> tuple[int, int, int]:
        """Differs where the picture or its caption was changed."""
        return self.size, self.modified, self.caption_modified


@dataclass
class PhotosReport:
    """What a run did to the index."""

    added: int = 0
    changed: int = 0
    gone: int = 0
    unchanged: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # pictures that cannot be read, by kind
    reason: str = ""  # for the kind of index


def index_photos(
    images_dir: str | Path,
    model_dir: str | Path,
    out: str | Path,
    patch_sizes: Sequence[int] = (),
    kind: IndexKind = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
    batch_size: int = 64,
    num_workers: int = 2,
    on_error: OnError = "skip",
) -> PhotosReport:
    """Index the pictures under a folder; of an index made before, only what is new or changed.

    patch_sizes: none means the index's, or all of the model's for a new one. kind, latency_ms,
    memory_gib: of a new index, see `build_index`. Pictures that cannot be read are skipped, counted
    by kind and tried again by the next run; with on_error="raise" the first one ends the run.
    Raises `UsageError` for a folder without pictures, an index of something else, or of another
    image tower.
    """
    check_batches(batch_size, num_workers)
    images, out = Path(images_dir).absolute(), Path(out)
    photos, report = list_photos(images, out)
    if not photos and not (out / "manifest.json").is_file():
        raise UsageError(f"{images} holds no picture ({', '.join(sorted(IMAGE_EXTS))})")
    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = LitModel.from_pretrained(model_dir, device=where)
    if not (out / "manifest.json").is_file():
        described = {
            "image_fingerprint": model.image_fingerprint,
            "text_fingerprint": model.text_fingerprint,
            "width": model.embed_dim,
            "patch_sizes": list(check_patch_sizes(model, patch_sizes)),
            "images": str(images),
        }
        index_pieces(out, Path(model_dir), described, [], kind, device, latency_ms, memory_gib)
    snapshot = Snapshot.open(out)
    _check_same(out, snapshot, model, images, patch_sizes)

    known = _known(snapshot)
    todo = [p for p in photos if p.path not in known or known[p.path][1] != p.state]
    listed = {photo.path for photo in photos}
    gone = [row[0] for path, row in known.items() if path not in listed]
    report.gone, report.unchanged = len(gone), len(photos) - len(todo)
    if gone:
        change_index(out, delete=gone)
    _take_in(
        out, model, snapshot.patch_sizes, todo, known, report, batch_size, num_workers, on_error
    )
    report.reason = _merge(out, device)
    return report


def list_photos(images: Path, out: Path) -> tuple[list[Photo], PhotosReport]:
    """The pictures under a folder, sorted by path; what is hidden, and `out` itself, left out."""
    if not images.is_dir():
        raise UsageError(f"{images} is no folder of pictures")
    photos, report = [], PhotosReport()
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
                add_counts(report.errors, {"not_utf8": 1})
            except OSError:  # a link to nowhere
                add_counts(report.errors, {"unreadable": 1})
            else:
                key = os.path.relpath(path, images)
                captioned = _caption_modified(folder, name, present)
                photos.append(Photo(path, key, stat.st_size, stat.st_mtime_ns, captioned))
    return sorted(photos, key=lambda photo: photo.path), report


def _caption_modified(folder: str, name: str, present: set[str]) -> int:
    """When KEY.txt or KEY.json beside a picture was changed, ns; of both, their exclusive or, so
    that either change shows."""
    changed = 0
    for ext in ("txt", "json"):
        beside = f"{name.rpartition('.')[0]}.{ext}"
        if beside in present:
            with suppress(OSError):
                changed ^= os.stat(os.path.join(folder, beside)).st_mtime_ns
    return changed


def _check_same(
    out: Path, snapshot: Snapshot, model: LitModel, images: Path, patch_sizes: Sequence[int]
) -> None:
    manifest = snapshot.manifest
    if manifest["images"] != str(images):
        made = manifest["images"] or "shards"
        raise UsageError(f"{out} was made from {made}, not from {images}; give another --out")
    if snapshot.columns is not None and not set(SCHEMA.names) <= set(snapshot.columns.names):
        raise UsageError(f"{out} was made by an earlier version; give another --out")
    if manifest["image_fingerprint"] != model.image_fingerprint:
        raise UsageError(f"{out} was made with another image tower; give that, or another --out")
    if patch_sizes and set(patch_sizes) != set(snapshot.patch_sizes):
        raise UsageError(
            f"{out} has patch sizes {', '.join(map(str, snapshot.patch_sizes))}, not "
            f"{', '.join(map(str, patch_sizes))}; give these, or another --out"
        )


Known = dict[str, tuple[int, tuple[int, int, int]]]
"""path -> (id, state) of what the index holds."""


def _known(snapshot: Snapshot) -> Known:
    known: Known = {}
    names = ("shard", "id", "size", "modified", "caption_modified")
    for segment in snapshot.segments:
        alive = segment.table.filter(pa.array(segment.alive))
        columns = (alive[name].to_pylist() for name in names)
        known |= {path: (id, tuple(state)) for path, id, *state in zip(*columns, strict=True)}
    return known


def _take_in(
    out: Path,
    model: LitModel,
    patch_sizes: Sequence[int],
    todo: Sequence[Photo],
    known: Known,
    report: PhotosReport,
    batch_size: int,
    num_workers: int,
    on_error: OnError,
) -> None:
    """Embed pictures and add them, those that replace another in the same step."""
    if not todo:
        return
    loader = DataLoader(
        _Pictures(todo, model.transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
    )
    sizes = ", ".join(map(str, patch_sizes))
    waiting = _Waiting(patch_sizes)
    with tqdm(total=len(todo), desc=f"embedding at patch {sizes}", unit="img") as bar:
        for batch in loader:
            for number, pixels, _, problem in batch:
                photo = todo[number]
                before = known.get(photo.path)
                if before is not None:
                    waiting.replaced.append(before[0])
                if pixels is not None:
                    report.changed += before is not None
                    report.added += before is None
                elif on_error == "raise":
                    raise SampleError.at(photo.path, problem)
                else:
                    add_counts(report.errors, {problem.kind: 1})
            waiting.add(model, [(todo[n], p, c) for n, p, c, _ in batch if p is not None])
            bar.update(len(batch))
            if waiting.num_seen >= CHUNK:
                waiting.write(out)
    waiting.write(out)


class _Waiting:
    """Embedded pictures between two writes, and the ids that they replace."""

    def __init__(self, patch_sizes: Sequence[int]) -> None:
        self.patch_sizes = patch_sizes
        self._clear()

    def _clear(self) -> None:
        self.replaced: list[int] = []
        self.rows: list[tuple[Photo, str]] = []
        self.embeds: dict[int, list[np.ndarray]] = {size: [] for size in self.patch_sizes}

    @property
    def num_seen(self) -> int:
        return max(len(self.rows), len(self.replaced))

    def add(self, model: LitModel, batch: Sequence[tuple[Photo, Tensor, str]]) -> None:
        """Pictures with pixels and caption."""
        if not batch:
            return
        images = torch.stack([pixels for _, pixels, _ in batch]).to(model.device)
        for size in self.patch_sizes:
            self.embeds[size].append(model.encode_image(images, patch_size=size).cpu().numpy())
        self.rows += [(photo, caption) for photo, _, caption in batch]

    def write(self, out: Path) -> None:
        """Add them to the index, in one step with the deletion of what they replace."""
        vectors = {size: np.concatenate(rows) for size, rows in self.embeds.items() if rows}
        change_index(out, self.replaced, lambda first_id: _rows(first_id, self.rows, vectors))
        self._clear()


def _rows(
    first_id: int, rows: Sequence[tuple[Photo, str]], vectors: dict[int, np.ndarray]
) -> list[Rows]:
    columns = {
        "id": first_id + np.arange(len(rows), dtype=np.int64),
        "key": [photo.key for photo, _ in rows],
        "caption": [caption for _, caption in rows],
        "shard": [photo.path for photo, _ in rows],
        "offset": np.zeros(len(rows), np.int64),
        "size": [photo.size for photo, _ in rows],
        "modified": [photo.modified for photo, _ in rows],
        "caption_modified": [photo.caption_modified for photo, _ in rows],
    }
    return [Rows(vectors, pa.Table.from_pydict(columns, schema=SCHEMA))]


def _merge(out: Path, device: Device) -> str:
    """Merge when much was added or deleted since the last time. Returns why this kind of index."""
    manifest = Snapshot.open(out).manifest
    base = sum(entry["count"] for entry in manifest["segments"] if not entry["delta"])
    added = sum(entry["count"] for entry in manifest["segments"] if entry["delta"])
    deleted = base + added - manifest["count"]
    if added + deleted > COMPACT_ABOVE * base:
        return compact_index(out, device)
    return manifest["reason"]


Loaded = tuple[int, Tensor | None, str, Problem | None]


class _Pictures(Dataset):
    """(number, pixels or None, caption, problem) of pictures in files of their own."""

    def __init__(self, photos: Sequence[Photo], transform: ImageTransform) -> None:
        self._photos, self._transform = photos, transform

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, number: int) -> Loaded:
        photo = self._photos[number]
        try:
            image = decode_image(Path(photo.path).read_bytes(), MAX_PIXELS)
        except BadSample as bad:
            return number, None, "", Problem(bad.kind, photo.key, bad.cause)
        except OSError as error:
            return number, None, "", Problem("unreadable", photo.key, str(error))
        return number, self._transform(image), _caption(Path(photo.path)), None


def _caption(path: Path) -> str:
    """Of KEY.txt or KEY.json beside the picture, "" where there is none."""
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
