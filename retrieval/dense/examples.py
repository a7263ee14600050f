"""Queries for boxes: texts, and pictures of what is looked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from contrastive.model.lit import LitModel
from data.given import as_rgb
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.regions.parts import reads_whole

SHARE = 0.25  # of a picture's patches, by which it is looked for


@torch.no_grad()
def example_embed(
    model: LitModel, picture: Any, patch_size: int | None = None
) -> Float[np.ndarray, " d"]:
    """The unit-norm vector by which a thing is found in the maps of other pictures, of a picture of
    it: the mean of the quarter of its patches that are most like the picture as a whole.

    picture: one of `data.given.Images`, nothing of which is cut away. patch_size: None takes the
    model's finest. Raises `UsageError` as `LitModel.encode_patches`.
    """
    whole, rgb = reads_whole(model), as_rgb(picture)
    patches = whole.encode_patches(rgb, patch_size)[0].flatten(0, 1)
    alike = patches @ whole.encode_image(rgb, patch_size)[0]
    chosen = patches[alike.topk(max(1, round(SHARE * len(patches)))).indices]
    embed: np.ndarray = torch.nn.functional.normalize(chosen.mean(0), dim=0).float().cpu().numpy()
    return embed


def query_names(queries: Sequence[Any]) -> list[str]:
    """What queries are called: texts by themselves, pictures by their number, from 1."""
    return [q if isinstance(q, str) else f"picture {n}" for n, q in enumerate(queries, 1)]


def query_embeds(
    model: LitModel, queries: Sequence[Any], templates: str | Sequence[str]
) -> Float[np.ndarray, "c d"]:
    """The unit-norm vectors of queries: texts, which take the place of class names in templates;
    what is no text is a picture."""
    is_text = np.array([isinstance(query, str) for query in queries])
    embeds = np.empty((len(queries), model.embed_dim), np.float32)
    if is_text.any():
        texts = [query for query in queries if isinstance(query, str)]
        embeds[is_text] = ZeroShotClassifier(model, texts, templates).class_embeds
    for number, query in enumerate(queries):
        if not is_text[number]:
            embeds[number] = example_embed(model, query)
    return embeds
