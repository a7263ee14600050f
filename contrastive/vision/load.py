"""Loads an image tower by its name, whatever its format."""

from pathlib import Path

import torch

from contrastive.vision.config import check_tower_spec
from contrastive.vision.feature_terms import OWN
from contrastive.vision.formats.own_format import load_saved_tower
from contrastive.vision.select_features import select_features
from contrastive.vision.tower import VisionTower
from data.transform import VERSIONS


def load_vision_tower(
    spec: str,
    *,
    locked: bool = True,
    dtype: torch.dtype = torch.float32,
    features: str = OWN,
) -> VisionTower:
    """Load an image tower.

    spec: `timm:NAME` (weights from the hub), `timm:NAME@FILE` (a safetensors or state-dict file),
    `timm:local-dir:FOLDER`, `bigvision:FILE.npz` or `bigvision:FILE.npz@SIZE`,
    `open_clip:ARCHITECTURE@FILE` or `open_clip:local-dir:FOLDER`,
    `transformers:FOLDER_OR_HUB_NAME`, `vit_pytorch:NAME@FILE`, `dinov2s` (DINOv2 from a wheel),
    `dinov2s-flexi` (the same made flexible, the offline default), or a folder that was saved by
    this project, which names the version of its transform; the others have the newest. Raises
    `UsageError` for anything else.
    features: which tokens of which blocks make a feature, such as `cls`, `mean`, `cls@-2`,
    `cls@9+cls@10+mean`; own: what the tower gives. Blocks count from 1, or from the end with a
    minus; their tokens are layer-normed; `+` joins.
    """
    check_tower_spec(spec)
    tower = _load(spec)
    if tower is None:
        tower = load_saved_tower(Path(spec))
    else:
        tower.use_transform(VERSIONS[-1])
    tower = select_features(tower, features)
    tower.to(dtype)
    return tower.lock() if locked else tower


def _load(spec: str) -> VisionTower | None:
    """None for a folder. Formats are imported only when used: most need a heavy library."""
    kind, _, rest = spec.partition(":")
    if kind == "timm" and rest:
        from contrastive.vision.formats.timm import load_timm

        return load_timm(rest)
    if kind == "bigvision" and rest:
        from contrastive.vision.formats.big_vision import load_big_vision

        return load_big_vision(rest)
    if kind == "open_clip" and rest:
        from contrastive.vision.formats.open_clip import load_open_clip

        return load_open_clip(rest)
    if kind == "transformers" and rest:
        from contrastive.vision.formats.transformers import load_transformers

        return load_transformers(rest)
    if kind == "vit_pytorch" and rest:
        from contrastive.vision.formats.vit_pytorch import load_vit_pytorch

        return load_vit_pytorch(rest)
    if spec in ("dinov2s", "dinov2s-flexi"):
        from contrastive.vision.formats import dinov2s

        return dinov2s.load_dinov2s() if spec == "dinov2s" else dinov2s.load_dinov2s_flexi()
    return None
