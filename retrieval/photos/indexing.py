"""Builds the index of a folder of photos, and updates it when the folder has changed.

The index is written every WRITE_EVERY photos or WRITE_S seconds, so an interrupted run continues
from there, and what is done can be searched meanwhile. `changes.py` says what a photo's row holds.
A photo whose contents the index holds already (it was moved or copied, or its caption alone was
changed) takes the vectors from there.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from contrastive.image_features import images_read_together
from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.config import NUM_WORKERS, Fit, OnError
from data.errors import UsageError, check_utf8
from data.locks import only_writer
from data.pipeline.workers import begin_worker
from data.problems import Problem, skip_or_raise
from data.progress import Progress
from retrieval.detail import Detail, MaxTokens, said
from retrieval.embed.config import BATCH_SIZE, check_batches
from retrieval.embed.encode import check_details, check_encodes, reader_cuts
from retrieval.index.build import change_index, new_manifest, write_base
from retrieval.index.config import LATENCY_MS, Device, IndexTypeChoice
from retrieval.index.folder import commit, locked, new_folder
from retrieval.index.snapshot import Snapshot
from retrieval.index.widen import compact_when_due
from retrieval.index_places import index_folder
from retrieval.model_folder import load_model, to_copy
from retrieval.photos.albums import AlbumFacts
from retrieval.photos.changes import (
    SCHEMA_0_1,
    Changes,
    compare,
    is_same_folder,
    known_contents,
)
from retrieval.photos.listing import Listing, Photo, list_photos, no_photo
from retrieval.photos.reading import LoadedPhoto, Photos
from retrieval.photos.summary import PhotosReport
from retrieval.photos.writing import Waiting

WRITE_EVERY = 8192  # photos
WRITE_S = 10.0  # a write takes a few hundredths of a second, whatever the index holds
OnProgress = Callable[[int, int, int], object]


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
    prune: bool = False,
    kind: IndexTypeChoice | None = None,
    on_progress: OnProgress | None = None,
    failed: dict[Photo, Problem] | None = None,
    max_tokens: Sequence[int] = (),
    fit: Fit | None = None,
) -> PhotosReport:
    """Index the photos under a folder; for an existing index, only what is new or changed.

    patch_sizes, max_tokens, fit: as of `embed_shards`; none means the index's, or all of the
    model's patch sizes and its fit for a new one. index_type, latency_ms, memory_gib, kind: of a
    new index, see `build_index`. Photos that cannot be read are skipped, counted by reason and
    tried again by the next run; with on_error="raise" the first one, or the first caption that
    cannot be used, ends the run. prune: drop photos of folders that are empty, missing or cannot be
    listed, which are kept without. on_progress: is told, in place of a bar, how many photos of how
    many are done, and how many the index held. failed: photos that are not tried again as long as
    their files stay as they were; those that fail are added. A folder that holds what the index was
    made from elsewhere is taken for the same, moved.
    Raises `UsageError` for a folder without photos, an index of something else or of another image
    tower, and while another program writes it.
    """
    check_batches(batch_size, num_workers)
    images, out = Path(images_dir).absolute(), index_folder(out, "a folder of photos")
    check_utf8(str(images), str(out))
    with only_writer(out):
        listing = list_photos(images, out)
        is_new = not (out / "manifest.json").is_file()
        if is_new and not listing.photos:
            raise UsageError(no_photo(images, listing))
        model = None
        if is_new or Path(model_dir) != out / "model":
            model = load_model(model_dir, device)
        if model and is_new:
            new_album(
                out, images, model_dir, model, check_details(model, patch_sizes, max_tokens),
                kind or index_type, device, latency_ms, memory_gib, fit=fit,
            )  # fmt: skip
        snapshot = Snapshot.open(out)
        model = model and with_fit(model, fit or snapshot.manifest.fit)
        _check_same(out, snapshot, model, (*patch_sizes, *map(MaxTokens, max_tokens)), fit)
        moved_from = _moved_from(out, snapshot, images, listing)
        if moved_from:
            _note_folder(out, images)

        changes = compare(listing, snapshot, prune)
        report = PhotosReport(
            gone=len(changes.gone),
            unchanged=changes.num_unchanged,
            errors=listing.errors,
            left_out=listing.left_out,
            moved_from=moved_from,
        )
        failed = {} if failed is None else failed
        changes = _without_failed(changes, failed, report)
        if on_progress is not None:
            on_progress(0, len(changes.new), changes.num_unchanged)
        if changes.new:
            model = model or with_fit(load_model(model_dir, device), snapshot.manifest.fit)
            to_read = [photo for photo in changes.new if photo.key not in changes.same_file]
            contents = known_contents(snapshot, to_read)
            loader = DataLoader(
                Photos(
                    changes.new,
                    model.transform,
                    changes.same_file,
                    contents,
                    reader_cuts(model, snapshot.patch_sizes),
                ),
                batch_size=batch_size or images_read_together(model.device),
                num_workers=num_workers,
                worker_init_fn=begin_worker,
                collate_fn=list,
                generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
            )
            _add_photos(
                out, model, snapshot, loader, changes, report, on_error, on_progress, failed
            )
        if changes.gone:  # last, so that a run that was stopped finds the vectors of moved photos
            change_index(out, delete=changes.gone)
        report.kept = len(changes.kept)
        report.kept_folders = sorted(set(changes.kept.values()))
        report.reason = compact_when_due(out, device)
        return report


def new_album(
    out: Path,
    images: Path,
    model_dir: str | Path,
    model: LitModel,
    details: Sequence[Detail],
    index_type: IndexTypeChoice = "auto",
    device: Device = "auto",
    latency_ms: float = LATENCY_MS,
    memory_gib: float = 0.0,
    facts: AlbumFacts | None = None,
    fit: Fit | None = None,
) -> None:
    """An index of a folder of photos that holds none of them yet. model_dir: what `model` was
    loaded by. details: patch sizes or budgets. facts: to be kept in it. fit: None for the model's
    own."""
    fitted = with_fit(model, fit)
    check_encodes(fitted, *details)
    if fitted.transform.fit != "crop":
        fit = fitted.transform.fit  # so that asking for it by name is no other
    manifest = new_manifest(
        fitted.image_fingerprint, model.text_fingerprint, model.embed_dim, details, str(images),
        index_type, device, latency_ms, memory_gib, fit,
    )  # fmt: skip
    with new_folder(out, to_copy(model_dir, model)) as partial:
        manifest, segments = write_base(partial, manifest, [], device, model)
        commit(partial, manifest, segments)
        if facts is not None:
            facts.write(partial)


def _check_same(
    out: Path,
    snapshot: Snapshot,
    model: LitModel | None,
    details: Sequence[Detail],
    fit: Fit | None,
) -> None:
    """model: None for the index's own."""
    manifest = snapshot.manifest
    if not manifest.images:
        raise UsageError(f"{out} was made from shards, not from photos; choose another folder")
    if snapshot.columns is not None and not set(SCHEMA_0_1.names) <= set(snapshot.columns.names):
        raise UsageError(f"{out} was made by an earlier version; choose another folder")
    if fit is not None and manifest.fit != fit and (manifest.fit or fit != "crop"):
        raise UsageError(
            f"{out} was made with fit {manifest.fit or 'crop'}, not {fit}; leave --fit out, or "
            "choose another folder"
        )
    if model and manifest.image_fingerprint != model.image_fingerprint:
        raise UsageError(f"{out} was made with another image tower; give that, or another folder")
    if details and set(details) != set(snapshot.patch_sizes):
        kind = "patch sizes" if isinstance(snapshot.patch_sizes[0], int) else "budgets of"
        raise UsageError(
            f"{out} has {kind} {', '.join(map(str, snapshot.patch_sizes))}, not "
            f"{', '.join(map(str, details))}; give these, or choose another folder"
        )


def _moved_from(out: Path, snapshot: Snapshot, images: Path, listing: Listing) -> str:
    """The folder that the photos were in before, "" for the same. Raises `UsageError` where
    `images` holds others."""
    before = snapshot.manifest.images
    if before == str(images):
        return ""
    if not is_same_folder(listing, snapshot):
        raise UsageError(
            f"{out} was made from {before}, and {images} does not hold half of its photos; choose "
            "another folder"
        )
    return before


def _note_folder(out: Path, images: Path) -> None:
    """Let an index find its photos under another folder; rows stay as they are."""
    with locked(out):
        snapshot = Snapshot.open(out)
        manifest = replace(snapshot.manifest, images=str(images))
        commit(out, manifest, manifest.segments, snapshot.tombstones)


def _without_failed(
    changes: Changes, failed: Mapping[Photo, Problem], report: PhotosReport
) -> Changes:
    """Without the photos that would fail again, which are counted."""
    new = []
    for photo in changes.new:
        problem = failed.get(photo)
        if problem is None:
            new.append(photo)
        else:
            report.skip(problem)
    return replace(changes, new=new)


# ---- embed and write -----------------------------------------------------------------------


def _add_photos(
    out: Path,
    model: LitModel,
    snapshot: Snapshot,
    loader: DataLoader,
    changes: Changes,
    report: PhotosReport,
    on_error: OnError,
    on_progress: OnProgress | None,
    failed: dict[Photo, Problem],
) -> None:
    """Embed photos and add them, those that replace another in the same step.

    snapshot: of the index before, for the vectors of contents that it holds. failed: is told of
    those that cannot be read.
    """
    waiting = Waiting(snapshot)
    done, total = 0, len(changes.new)
    written = 0.0  # so the first batch can be searched at once
    what, silent = f"embedding at {said(*snapshot.patch_sizes)}", on_progress is not None
    with Progress(total=total, desc=what, unit="img", disable=silent) as bar:
        for batch in loader:
            for loaded in batch:
                waiting.replaced += _settle(loaded, changes, report, on_error)
                if loaded.problem is not None:
                    failed[loaded.photo] = loaded.problem
            waiting.add(model, [loaded for loaded in batch if loaded.problem is None])
            bar.update(len(batch))
            done += len(batch)
            if waiting.num_seen >= WRITE_EVERY or time.monotonic() - written > WRITE_S:
                waiting.write(out)
                written = time.monotonic()
            if on_progress is not None:
                on_progress(done, total, changes.num_unchanged)
    waiting.write(out)


def _settle(
    loaded: LoadedPhoto, changes: Changes, report: PhotosReport, on_error: OnError
) -> list[int]:
    """Count a photo. Returns the ids whose place it takes."""
    path, key = loaded.photo.path, loaded.photo.key
    before = [changes.replaced[key]] if key in changes.replaced else []
    if loaded.problem is not None:
        skip_or_raise(loaded.problem, path, on_error, {})
        report.skip(loaded.problem)
        return [] if loaded.problem.kind == "unreadable" else before  # it may be back
    if (problem := loaded.caption_problem) is not None:
        harmless = problem.kind == "no_caption"  # a .json of something else
        skip_or_raise(problem, path, "skip" if harmless else on_error, report.captions)
    report.changed += len(before)
    report.added += not before
    if loaded.known is not None:
        report.known += 1
        if changes.kept.pop(loaded.known, None) is not None:  # its folder was moved
            report.gone += 1
            before.append(loaded.known)
    return before
