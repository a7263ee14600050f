"""Measures how far a coarse patch size finds what the model's own patch size finds.

Images of the index are the queries: no labels and no captions are needed. Where the index has no
vectors at the own patch size, some of its images are encoded there and compared among themselves.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.progress import Progress
from data.shards.location import ImageLocation
from retrieval.detail import Detail, MaxTokens, finest, num_tokens, said
from retrieval.index.config import Device
from retrieval.index.snapshot import Snapshot
from retrieval.index_places import index_folder
from retrieval.model_folder import load_model
from retrieval.search.agreement import (
    CHANGED,
    NEAREST,
    Agreement,
    SizeAgreement,
    read_agreement,
    write_agreement,
)
from retrieval.search.calibration import unit
from retrieval.search.config import CANDIDATES
from retrieval.search.refine import BATCH, FineVectors

QUERIES = 256  # images, of which half the width of a 95% interval is 0.03 or less
MIN_IMAGES = 50  # fewer say nothing
SECONDS = 40.0  # that queries may take; one minute with the model's loading
EXACTLY = 200_000  # images that are scanned; of more, what the index itself finds is compared


def measure_agreement(
    folder: str | Path,
    model: LitModel | None = None,
    device: Device = "auto",
    *,
    seconds: float = SECONDS,
) -> Agreement | None:
    """Measure an index and keep it in its folder; what was measured before an index changed by a
    fifth is kept.

    model: of the index; when not given, read from the folder, on a GPU where `device` allows it and
    there is one. seconds: after which fewer images are queries. Returns None for an index that is
    too small, and where its images cannot be read.
    Raises `UsageError` for Milvus, and a folder that is no index.
    """
    folder = index_folder(folder, "measuring how patch sizes agree")
    snapshot = Snapshot.open(folder)
    if len(snapshot) < MIN_IMAGES:
        return None
    known = read_agreement(folder)
    if known is not None and not _has_changed(snapshot, known):
        return known
    if model is None:
        model = load_model(folder / "model", device)
    model = with_fit(model, snapshot.manifest.fit)
    ids = snapshot.ids()
    queries = np.random.default_rng(0).permutation(ids)[:QUERIES]
    own, held = _reference(model, snapshot.patch_sizes), snapshot.patch_sizes
    sizes: dict[Detail, SizeAgreement] = {}
    coarse = [size for size in held if size != own]
    until = time.monotonic() + seconds
    images = len(ids)
    if coarse and own in held:
        queries = _compare_all(snapshot, queries, own, coarse, until, sizes)
    elif coarse:
        kept = FineVectors(model, folder / "fine.sqlite")
        fine = _encode(snapshot, kept, queries, own, until)
        if len(fine) < MIN_IMAGES:
            return None
        queries, images = np.array([*fine]), len(fine)
        at_own = np.stack([*fine.values()])
        for size in coarse:
            found_at = unit(snapshot.vectors(queries.tolist(), size))
            sizes[size] = compare_vectors(at_own, found_at, len(ids))
    manifest = snapshot.manifest
    found = Agreement(
        own, len(queries) if coarse else 0, images, len(ids), manifest.next_id,
        manifest.image_fingerprint, held, sizes,
    )  # fmt: skip
    with suppress(OSError):  # a disk that is full or read-only costs only the measurement
        write_agreement(folder, found)
    return found


def compare_vectors(
    own: Float[np.ndarray, "q d"], coarse: Float[np.ndarray, "q d"], total: int
) -> SizeAgreement:
    """What unit vectors at one patch size find of what those at the own size find: each image's
    neighbours among the others.

    total: images that these were drawn from at random. They lie further apart than all would, so
    fewer neighbours are compared: the nearest of one in n images stands for the n nearest. The
    candidates keep their ratio to them, and are not told where less than one image stands for the
    nearest.
    """
    k = max(1, round(NEAREST * len(own) / total))
    depth = min(len(own) - 1, CANDIDATES // NEAREST * k)
    nearest, found = _nearest(own, k), _nearest(coarse, depth)
    told = NEAREST * len(own) >= total and _few(depth, len(own))
    return SizeAgreement(overlap(found[:, :k], nearest), overlap(found, nearest) if told else None)


def _few(candidates: int, images: int) -> bool:
    """Whether so many candidates are few enough of the images that finding neighbours among them
    says something."""
    return 2 * candidates <= images


def overlap(found: Int[np.ndarray, "q c"], nearest: Int[np.ndarray, "q k"]) -> float:
    """The share of `nearest` that is among `found`, row by row; negative ids are nothing."""
    pairs = [(set(a), set(b) - {-1}) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
    return float(np.mean([len(a & b) / len(b) for a, b in pairs if b]))


def without_self(
    found: Int[np.ndarray, "q c"], queries: Int[np.ndarray, " q"]
) -> Int[np.ndarray, "q d"]:
    """Rows without the query's own id, one shorter."""
    order = np.argsort(found == queries[:, None], axis=1, kind="stable")  # its own goes last
    return np.take_along_axis(found, order, axis=1)[:, :-1]


def _reference(model: LitModel, held: Sequence[Detail]) -> Detail:
    """The patch size that others are compared with: the model's own; where a model that offers
    several is not indexed at that, the finest that is indexed."""
    own: Detail = model.vision.own_patch_size
    if any(isinstance(size, MaxTokens) for size in held):
        own = MaxTokens(num_tokens(own, model.image_size))
    several = len(model.patch_sizes) > 1 and len(held) > 1
    return finest(held) if several and own not in held else own


def _has_changed(snapshot: Snapshot, known: Agreement) -> bool:
    manifest = snapshot.manifest
    if (
        known.image_fingerprint != manifest.image_fingerprint
        or known.indexed != manifest.patch_sizes
    ):
        return True
    kept = int(np.searchsorted(snapshot.ids(), known.next_id))  # ids are ascending, never reused
    added, deleted = len(snapshot) - kept, known.count - kept
    return added + deleted > CHANGED * known.count


def _compare_all(
    snapshot: Snapshot,
    queries: Int[np.ndarray, " q"],
    own: Detail,
    coarse: Sequence[Detail],
    until: float,
    sizes: dict[Detail, SizeAgreement],
) -> Int[np.ndarray, " q"]:
    """Fill `sizes`, of neighbours among all images. Returns the queries that there was time for."""
    exact = len(snapshot) <= EXACTLY
    depth = min(CANDIDATES, len(snapshot) - 1)
    found: dict[Detail, list[np.ndarray]] = {size: [] for size in (own, *coarse)}
    starts = range(0, len(queries), BATCH)
    for start in Progress(starts, "comparing patch sizes", unit="batch", delay=5, leave=False):
        if start and time.monotonic() > until:
            queries = queries[:start]
            break
        part = queries[start : start + BATCH]
        for size, rows in found.items():
            k = NEAREST if size == own else depth
            embeds = unit(snapshot.vectors(part.tolist(), size))
            rows.append(without_self(snapshot.nearest(embeds, k + 1, size, exact=exact)[1], part))
    nearest = np.concatenate(found[own])
    for size in coarse:
        rows_at = np.concatenate(found[size])
        told = overlap(rows_at, nearest) if _few(depth, len(snapshot)) else None
        sizes[size] = SizeAgreement(overlap(rows_at[:, :NEAREST], nearest), told)
    return queries


def _encode(
    snapshot: Snapshot,
    kept: FineVectors,
    queries: Int[np.ndarray, " q"],
    own: Detail,
    until: float,
) -> dict[int, Float[np.ndarray, " d"]]:
    """Vectors at the own patch size, of images that can be read and there is time for. They are
    kept for coarse to fine."""
    fine: dict[int, np.ndarray] = {}
    starts = range(0, len(queries), BATCH)
    for start in Progress(starts, f"encoding at {said(own)}", unit="batch", delay=5, leave=False):
        if len(fine) >= MIN_IMAGES and time.monotonic() > until:
            break
        rows = snapshot.rows(queries[start : start + BATCH])
        fine |= kept.get({row["id"]: ImageLocation.of(row) for row in rows}, own)
    return fine


def _nearest(vectors: Float[np.ndarray, "q d"], k: int) -> Int[np.ndarray, "q k"]:
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]
