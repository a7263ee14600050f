"""Queries as vectors: texts, and images or parts of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from retrieval.detail import Detail, encoding
from retrieval.regions.boxes import check_box
from retrieval.regions.parts import part_of, reads_whole
from retrieval.words.asked import unmarked


def query_vectors(
    model: LitModel,
    queries: Sequence[Any],
    patch_size: Detail,
    refined: Detail,
    words: bool,
    box: Sequence[float] | None,
) -> tuple[Float[np.ndarray, "q d"], Float[np.ndarray, "q d"]]:
    """Unit-norm vectors, images at `patch_size`, and the same with images as `refined` sees them.

    queries: texts, and what `read_queries` makes of images. words: texts may hold the marks of a
    search by words, which no model reads. box: the part of each image that is meant.
    """
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
