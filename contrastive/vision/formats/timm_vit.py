"""ViTs of other libraries as timm's: flexible, trainable and exported like any of timm's."""

from typing import Any

from torch import Tensor

from contrastive.files.weights import load_weights
from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig

PLAIN_VIT = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
"""timm's plain ViT by the eps of its norms; all its sizes are arguments."""


def timm_vit(
    name: str,
    args: dict[str, Any],
    weights: dict[str, Tensor],
    projection: Tensor | None,
    facts: dict[str, Any],
) -> VisionTower:
    """A tower of timm's ViT with these weights, reshaped where only the shape differs.

    facts: `image_size`, `mean` and `std` of `TowerConfig`.
    """
    width = 0 if projection is None else projection.shape[0]
    tower = build_vision_tower(TowerConfig(name, args, projection=width, **facts))
    for key, own in tower.net.state_dict().items():
        if key in weights and weights[key].numel() == own.numel():
            weights[key] = weights[key].reshape(own.shape)
    load_weights(tower.net, weights, name)
    if projection is not None:
        tower.projection.load_state_dict({"weight": projection})
    return tower.offer_own_size(alone=False) if tower.image_size % args["patch_size"] else tower


def rename_keys(
    weights: dict[str, Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """The same tensors, each (old, new) replaced in their names, in that order."""
    out = {}
    for key, value in weights.items():
        for old, new in names:
            key = key.replace(old, new)
        out[key] = value
    return out
