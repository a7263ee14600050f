"""Calibrates an index by texts that it answers: its images' captions, or a user's own."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.errors import UsageError
from data.progress import Progress
from data.shards.location import ImageLocation
from retrieval.detail import Detail, coarse_first, said
from retrieval.embed.encode import check_encodes
from retrieval.index.config import Device
from retrieval.index.snapshot import Snapshot
from retrieval.index_places import index_folder
from retrieval.model_folder import load_model
from retrieval.search.background import COMMON
from retrieval.search.calibration import (
    FINE_ANSWERS,
    Calibration,
    Facts,
    calibration_file,
    read_calibration,
    unit,
    write_calibration,
)
from retrieval.search.config import MAX_K
from retrieval.search.refine import FineVectors, blend

CAPTIONS = "the captions of this index"
MAX_TEXTS = 1000  # of which 5% are told to within 0.7%
LOOKED_AT = 50_000  # images whose captions are read
DEEP = 50  # hits, among which the first of another caption is looked for
EXACTLY = 200_000  # images that are ranked by both patch sizes, text by text
BLOCK = 64  # texts
IMAGES = 4096  # whose fine vectors are computed in one go


def calibrate_index(
    folder: str | Path,
    model: LitModel | None = None,
    device: Device = "auto",
    *,
    texts: Sequence[str] = (),
    fine: Detail | None = None,
) -> Calibration:
    """Measure what an index's similarities say, and keep it in its folder.

    model: of the index; when not given, read from the folder, on a GPU where `device` allows it and
    there is one. texts: that the index answers; when not given, its own captions. fine: a patch
    size, or a budget of tokens, at which all images are encoded, where the index does not hold it,
    so that coarse to fine can promise something of it.
    Raises `UsageError` for Milvus, a folder that is no index, and where there is no text.
    """
    folder = index_folder(folder, "calibrating")
    snapshot = Snapshot.open(folder)
    if model is None:
        model = load_model(folder / "model", device)
    model = with_fit(model, snapshot.manifest.fit)
    captions = _captions(snapshot)
    source = f"{len(texts):,} given texts" if texts else CAPTIONS
    asked = _some(texts or captions.values())
    if not asked:
        raise UsageError(
            f"{folder}: no image has a caption to calibrate by; give --texts, a file of texts that "
            "the images answer, one a line"
        )
    if not len(snapshot):
        raise UsageError(f"{folder} holds no image, so there is nothing to calibrate")
    embeds = _encode(model, asked)
    common = _encode(model, COMMON)
    background = np.concatenate([common, embeds]) if not texts else common
    scale = float(model.text.scale().item())
    manifest = snapshot.manifest
    facts = Facts(
        source, len(asked), scale, len(snapshot), manifest.next_id,
        model.image_fingerprint, model.text_fingerprint,
    )  # fmt: skip
    found = Calibration(facts, background, {}, {}, {}, {})
    for size in snapshot.patch_sizes:
        _measure(found, snapshot, size, asked, embeds, not texts)
    if not texts:
        images = {text: id for id, text in captions.items()}
        own = np.array([images[text] for text in asked])
        for size in snapshot.patch_sizes:
            found.labels[size] = _scores(found, snapshot, size, embeds, own)
    _rank(found, snapshot, model, embeds, fine)
    write_calibration(folder, found)
    return found


def recalibrate(
    folder: str | Path, model: LitModel | None = None, device: Device = "auto"
) -> Calibration | None:
    """Calibrate anew, by captions, an index that was calibrated by them and has changed by a fifth
    since; returns what is new. Where no caption is left, it is forgotten."""
    folder = Path(folder)
    known = read_calibration(folder)
    if known is None or known.facts.source != CAPTIONS:
        return None
    snapshot = Snapshot.open(folder)
    prints = (known.facts.image_fingerprint, known.facts.text_fingerprint)
    if known.holds(snapshot.ids(), *prints) and set(known.present) == {*snapshot.patch_sizes}:
        return None
    if not _captions(snapshot):
        calibration_file(folder).unlink(missing_ok=True)
        return None
    fine = next((size for _, size in known.ranks if size not in snapshot.patch_sizes), None)
    return calibrate_index(folder, model, device, fine=fine)


# ---- texts ---------------------------------------------------------------------------------


def _captions(snapshot: Snapshot) -> dict[int, str]:
    """By id, of some of the images that have one."""
    ids = np.random.default_rng(0).permutation(snapshot.ids())[:LOOKED_AT]
    rows = snapshot.rows(ids)
    return {row["id"]: row["caption"].strip() for row in rows if (row["caption"] or "").strip()}


def _some(texts: Iterable[str]) -> list[str]:
    """At most `MAX_TEXTS` distinct ones."""
    distinct = sorted({text.strip() for text in texts if text.strip()})
    drawn = np.random.default_rng(0).permutation(len(distinct))[:MAX_TEXTS]
    return [distinct[number] for number in drawn]


def _encode(model: LitModel, texts: Sequence[str]) -> Float[np.ndarray, "t d"]:
    found = model.encode_text(list(texts)).float().cpu().numpy()
    if not np.isfinite(found).all():
        raise UsageError("the model's text vectors have numbers that are not finite")
    return found


# ---- measuring -----------------------------------------------------------------------------


def _measure(
    found: Calibration,
    snapshot: Snapshot,
    size: Detail,
    asked: Sequence[str],
    embeds: Float[np.ndarray, "t d"],
    own_captions: bool,
) -> None:
    """What texts reach by their hits, and by those of other captions."""
    depth = min(DEEP if own_captions else 1, len(snapshot))
    _, ids = snapshot.nearest(embeds, depth, size)
    found.present[size] = _scores(found, snapshot, size, embeds, ids[:, 0])
    if not own_captions:
        return
    distinct = np.unique(ids[ids >= 0])
    captions = {row["id"]: (row["caption"] or "").strip() for row in snapshot.rows(distinct)}
    others = np.array(
        [
            next((id for id in line if id >= 0 and captions[id] != text), -1)
            for text, line in zip(asked, ids.tolist(), strict=True)
        ]
    )
    found.absent[size] = _scores(found, snapshot, size, embeds, others)


def _scores(
    found: Calibration,
    snapshot: Snapshot,
    size: Detail,
    texts: Float[np.ndarray, "t d"],
    best: Int[np.ndarray, " t"],
) -> Float[np.ndarray, " n"]:
    """Of those texts that have a best image; -1: none."""
    known = best >= 0
    return found.scores(snapshot.vectors(best[known].tolist(), size), texts[known])


def _rank(
    found: Calibration,
    snapshot: Snapshot,
    model: LitModel,
    embeds: Float[np.ndarray, "t d"],
    fine: Detail | None,
) -> None:
    """Where the candidates hold each text's answers, at every two patch sizes that the index holds,
    and at `fine`."""
    held = coarse_first(snapshot.patch_sizes)
    pairs = [(coarse, other) for n, coarse in enumerate(held) for other in held[n + 1 :]]
    if fine is not None and fine not in held:
        check_encodes(model, fine)
        pairs += [(coarse, fine) for coarse in held]
    if not pairs or len(snapshot) > EXACTLY:
        return
    ids = snapshot.ids()
    vectors = {size: unit(snapshot.vectors(ids.tolist(), size)) for size in held}
    if fine is not None and fine not in held:
        vectors[fine] = _encode_images(snapshot, model, fine)
    k, depth = min(FINE_ANSWERS, len(ids)), min(MAX_K, len(ids))
    for coarse, other in pairs:
        ranks = np.full((len(embeds), k), MAX_K, np.int32)
        for start in range(0, len(embeds), BLOCK):
            part = embeds[start : start + BLOCK]
            both = blend(part @ vectors[other].T, part @ vectors[coarse].T)
            answers = ids[np.argsort(-both, axis=1, kind="stable")[:, :k]]
            _, candidates = snapshot.nearest(part, depth, coarse)
            for row, (wanted, line) in enumerate(zip(answers, candidates, strict=True), start):
                ranks[row] = places(wanted, line)
        found.ranks[coarse, other] = ranks


def places(
    wanted: Int[np.ndarray, " k"], candidates: Int[np.ndarray, " c"]
) -> Int[np.ndarray, " k"]:
    """Where each id is among the candidates, `MAX_K` where it is not."""
    order = np.argsort(candidates, kind="stable")
    at = np.minimum(np.searchsorted(candidates, wanted, sorter=order), len(order) - 1)
    return np.where(candidates[order[at]] == wanted, order[at], MAX_K).astype(np.int32)


def _encode_images(
    snapshot: Snapshot, model: LitModel, patch_size: Detail
) -> Float[np.ndarray, "n d"]:
    """All of the index; those that cannot be read are zeros."""
    kept = FineVectors(model, snapshot.folder / "fine.sqlite")
    ids = snapshot.ids()
    found = np.zeros((len(ids), snapshot.width), np.float32)
    starts = Progress(range(0, len(ids), IMAGES), f"encoding at {said(patch_size)}", unit="block")
    for start in starts:
        rows = snapshot.rows(ids[start : start + IMAGES])
        vectors = kept.get({row["id"]: ImageLocation.of(row) for row in rows}, patch_size)
        for number, row in enumerate(rows, start):
            if row["id"] in vectors:
                found[number] = vectors[row["id"]]
    return found
