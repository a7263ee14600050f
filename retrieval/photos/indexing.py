"""Builds the index of a folder of photos, and updates it when the folder has changed.

The index is written every WRITE_EVERY photos, so an interrupted run continues from there, and what
is done can be searched meanwhile. `listing.py` says what a photo's row holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contrastive.model.lit import LitModel
from data.config import OnError
from data.errors import UsageError
from data.images import decode_image
from data.pipeline.workers import outlive_signals
from data.problems import BadSample, Problem, attempt, skip_or_raise
from data.progress import Progress
from data.shards.tar import IMAGE_EXTS
from data.transform import ImageTransform
from retrieval.embed.bulk import check_patch_sizes
from retrieval.embed.config import BATCH_SIZE, NUM_WORKERS, check_batches
from retrieval.index.build import change_index, compact_index, index_rows, new_manifest
from retrieval.index.config import LATENCY_MS, Device, IndexTypeChoice
from retrieval.index.row_sources import RowsInMemory
from retrieval.index.snapshot import Snapshot
from retrieval.photos.listing import SCHEMA, Photo, compare, list_photos, read_caption

WRITE_EVERY = 8192  # photos
COMPACT_ABOVE = 0.2  # share of the index that was added or deleted since the last compaction
MAX_PIXELS = 100_000_000


@dataclass
class PhotosReport:
    """What a run did to the index."""

    added: int = 0
    changed: int = 0
    gone: int = 0
    unchanged: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # photos that cannot be read, by reason
    reason: str = ""  # for the index type


def index_photos(
    images_dir: str | Path,
    model_dir: str | Path,
    out: str | Path,
    patch_sizes: Sequence[int] = (),
    index_type: IndexTypeChoice = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
    batch_size: int = BATCH_SIZE,
    num_workers: int = NUM_WORKERS,
    on_error: OnError = "skip",
    *,
    kind: IndexTypeChoice | None = None,
) -> PhotosReport:
    """Index the photos under a folder; for an existing index, only what is new or changed.

    patch_sizes: none means the index's, or all of the model's for a new one. index_type,
    latency_ms, memory_gib, kind: of a new index, see `build_index`. Photos that cannot be read are
    skipped, counted by reason and tried again by the next run; with on_error="raise" the first one
    ends the run. Raises `UsageError` for a folder without photos, an index of something else, or of
    another image tower.
    """
    check_batches(batch_size, num_workers)
    images, out = Path(images_dir).absolute(), Path(out)
    photos, errors = list_photos(images, out)
    if not photos and not (out / "manifest.json").is_file():
        raise UsageError(f"{images} holds no photo ({', '.join(sorted(IMAGE_EXTS))})")
    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = LitModel.from_pretrained(model_dir, device=where)
    if not (out / "manifest.json").is_file():
        manifest = new_manifest(
            model.image_fingerprint, model.text_fingerprint, model.embed_dim,
            check_patch_sizes(model, patch_sizes), str(images), kind or index_type, device,
            latency_ms, memory_gib,
        )  # fmt: skip
        index_rows(out, Path(model_dir), manifest, [], device)
    snapshot = Snapshot.open(out)
    _check_same(out, snapshot, model, images, patch_sizes)

    diff = compare(photos, snapshot)
    report = PhotosReport(gone=len(diff.gone), unchanged=diff.num_unchanged, errors=errors)
    if diff.gone:
        change_index(out, delete=diff.gone)
    if diff.new:
        loader = DataLoader(
            _Photos(diff.new, model.transform),
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=outlive_signals,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
        )
        _add_photos(out, model, snapshot.patch_sizes, loader, diff.replaced, report, on_error)
    report.reason = _compact(out, device)
    return report


def _check_same(
    out: Path, snapshot: Snapshot, model: LitModel, images: Path, patch_sizes: Sequence[int]
) -> None:
    manifest = snapshot.manifest
    if manifest.images != str(images):
        made = manifest.images or "shards"
        raise UsageError(f"{out} was made from {made}, not from {images}; choose another folder")
    if snapshot.columns is not None and not set(SCHEMA.names) <= set(snapshot.columns.names):
        raise UsageError(f"{out} was made by an earlier version; choose another folder")
    if manifest.image_fingerprint != model.image_fingerprint:
        raise UsageError(f"{out} was made with another image tower; give that, or another folder")
    if patch_sizes and set(patch_sizes) != set(snapshot.patch_sizes):
        raise UsageError(
            f"{out} has patch sizes {', '.join(map(str, snapshot.patch_sizes))}, not "
            f"{', '.join(map(str, patch_sizes))}; give these, or choose another folder"
        )


def _compact(out: Path, device: Device) -> str:
    """Compact when much was added or deleted since the last time. Returns why this index type."""
    manifest = Snapshot.open(out).manifest
    base = sum(entry.count for entry in manifest.segments if not entry.delta)
    added = sum(entry.count for entry in manifest.segments if entry.delta)
    deleted = base + added - manifest.count
    if added + deleted > COMPACT_ABOVE * base:
        return compact_index(out, device)
    return manifest.reason


# ---- read ----------------------------------------------------------------------------------

Loaded = tuple[Photo, Tensor | None, str, Problem | None]
"""A photo, its pixels and caption, or what is wrong with it."""


class _Photos(Dataset):
    """Photos read from files of their own."""

    def __init__(self, photos: Sequence[Photo], transform: ImageTransform) -> None:
        self._photos, self._transform = photos, transform

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, number: int) -> Loaded:
        photo = self._photos[number]
        image = attempt(photo.key, lambda: _decode(Path(photo.path)))
        if isinstance(image, Problem):
            return photo, None, "", image
        return photo, self._transform(image), read_caption(Path(photo.path)), None


def _decode(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes(), MAX_PIXELS)
    except OSError as error:
        raise BadSample("unreadable", str(error)) from None


# ---- embed and write -----------------------------------------------------------------------


def _add_photos(
    out: Path,
    model: LitModel,
    patch_sizes: Sequence[int],
    loader: DataLoader,
    replaced: Mapping[str, int],
    report: PhotosReport,
    on_error: OnError,
) -> None:
    """Embed photos and add them, those that replace another in the same step.

    replaced: path of a changed photo -> its id before.
    """
    sizes = ", ".join(map(str, patch_sizes))
    waiting = _Waiting(patch_sizes)
    total = len(loader.dataset)  # type: ignore[arg-type]
    with Progress(total=total, desc=f"embedding at patch {sizes}", unit="img") as bar:
        for batch in loader:
            for photo, pixels, _, problem in batch:
                if photo.path in replaced:
                    waiting.replaced.append(replaced[photo.path])
                if pixels is not None:
                    report.changed += photo.path in replaced
                    report.added += photo.path not in replaced
                else:
                    skip_or_raise(problem, photo.path, on_error, report.errors)
            waiting.add(model, [(photo, p, c) for photo, p, c, _ in batch if p is not None])
            bar.update(len(batch))
            if waiting.num_seen >= WRITE_EVERY:
                waiting.write(out)
    waiting.write(out)


class _Waiting:
    """Embedded photos between two writes, and the ids that they replace."""

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
        """Photos with pixels and caption."""
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
    first_id: int, rows: Sequence[tuple[Photo, str]], vectors: Mapping[int, np.ndarray]
) -> list[RowsInMemory]:
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
    return [RowsInMemory(vectors, pa.Table.from_pydict(columns, schema=SCHEMA))]
