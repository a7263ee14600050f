"""Queries as vectors: texts, images or parts of them, and mixes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.detail import Detail, encoding
from retrieval.regions.boxes import check_box
from retrieval.regions.parts import part_of, reads_whole
from retrieval.search.query_images import Parts
from retrieval.words.asked import unmarked

ROUNDING = 1e-4  # of a vector: one text in two forwards differs by less


def query_vectors(
    model: LitModel,
    queries: Sequence[Parts],
    patch_size: Detail,
    refined: Detail,
    words: bool,
    box: Sequence[float] | None,
) -> tuple[Float[np.ndarray, "q d"], Float[np.ndarray, "q d"]]:
    """Unit-norm vectors, images at `patch_size`, and the same with images as `refined` sees them.

    queries: of `read_queries`. words: texts may hold the marks of a search by words, which no model
    reads. box: the part of each image that is meant. Raises `UsageError` for a mix whose parts
    cancel out.
    """
    parts = [part for query in queries for part, _ in query]
    embeds, fine = _part_vectors(model, parts, patch_size, refined, words, box)
    mixed = _mixed(queries, embeds)
    return mixed, mixed if fine is embeds else _mixed(queries, fine)


def _mixed(queries: Sequence[Parts], embeds: Float[np.ndarray, "p d"]) -> Float[np.ndarray, "q d"]:
    """The weighted sum of each query's parts, of unit norm; `embeds` where no query is a mix."""
    if all(len(query) == 1 and query[0][1] > 0 for query in queries):
        return embeds
    rows, start = np.empty((len(queries), embeds.shape[1]), np.float32), 0
    for row, query in zip(rows, queries, strict=True):
        weights = np.array([weight for _, weight in query], np.float64)
        total = weights @ embeds[start : start + len(query)].astype(np.float64)
        if not np.abs(total).max() > ROUNDING * np.abs(weights).sum():
            raise UsageError("the parts of a mix cancel out: it points nowhere")
        row[:] = total / np.linalg.norm(total)
        start += len(query)
    return rows


def _part_vectors(
    model: LitModel,
    queries: Sequence[Any],
    patch_size: Detail,
    refined: Detail,
    words: bool,
    box: Sequence[float] | None,
) -> tuple[Float[np.ndarray, "p d"], Float[np.ndarray, "p d"]]:
    """`query_vectors` of texts and images."""
    embeds = np.empty((len(queries), model.embed_dim), np.float32)
    is_image = np.array([not isinstance(query, str) for query in queries])
    texts = [query for query in queries if isinstance(query, str)]
    images = [query for query in queries if not isinstance(query, str)]
    if texts:
        texts = [unmarked(text) for text in texts] if words else texts
        embeds[~is_image] = model.encode_text(texts).float().cpu().numpy()
    if not images:
        return embeds, embeds
    if box is not None:
        part = check_box(box)
        model, images = reads_whole(model), [part_of(image, part) for image in images]
    fine = embeds
    embeds[is_image] = model.encode_image(images, **encoding(patch_size)).float().cpu().numpy()
    if refined != patch_size:
        fine = embeds.copy()
        fine[is_image] = model.encode_image(images, **encoding(refined)).float().cpu().numpy()
    return embeds, fine
