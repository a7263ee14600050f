"""Pictures of what is looked for, in the place of texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.given import as_rgb
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


def example_embeds(
    model: LitModel, pictures: Sequence[Any], patch_size: int | None = None
) -> Float[np.ndarray, "c d"]:
    """`example_embed` of several."""
    return np.stack([example_embed(model, picture, patch_size) for picture in pictures])


def whole_embeds(
    model: LitModel, pictures: Sequence[Any], patch_size: int | None = None
) -> Float[np.ndarray, "c d"]:
    """The unit-norm vectors by which things are found in windows, of a picture of each, nothing of
    which is cut away."""
    rgb = [as_rgb(picture) for picture in pictures]
    embeds: np.ndarray = reads_whole(model).encode_image(rgb, patch_size).float().cpu().numpy()
    return embeds


def are_pictures(queries: Sequence[Any]) -> bool:
    """Whether queries are pictures, which all of them or none may be: cosines of two pictures are
    larger than those of a picture and a text. Raises `UsageError` for a mixture."""
    texts = sum(isinstance(query, str) for query in queries)
    if 0 < texts < len(queries):
        raise UsageError(
            f"{texts} texts and {len(queries) - texts} pictures: allowed are either, which "
            "cannot compete, since pictures are more like each other than like any text"
        )
    return not texts and len(queries) > 0
