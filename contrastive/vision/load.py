"""Building, loading and saving image towers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from contrastive.files.weights import load_weights, read_config, read_weights
from contrastive.vision.flexible_families import build_net
from contrastive.vision.tower import TowerConfig, VisionTower
from data.errors import UsageError


def build_vision_tower(config: TowerConfig) -> VisionTower:
    """An untrained tower of this architecture."""
    return VisionTower(build_net(config.library, config.timm_name, config.timm_args), config)


def save_vision_tower(
    tower: VisionTower, folder: str | Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write `config.json` and `model.safetensors`, which `load_vision_tower(folder)` reads.

    facts: more entries of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": 1, "vision": tower.describe(), **(facts or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {k: v.contiguous() for k, v in tower.state_dict().items()}, folder / "model.safetensors"
    )


def _load_folder(folder: Path) -> VisionTower:
    config = read_config(folder, "vision")
    try:
        tower = build_vision_tower(TowerConfig.from_json(config["vision"]))
    except UsageError as error:
        raise UsageError(f"{folder}/config.json: {error}") from error
    weights = read_weights(folder / "model.safetensors")
    prefix = "vision."  # a LitModel's folder serves as a tower too
    if any(name.startswith(prefix) for name in weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    load_weights(tower, weights, folder)
    return tower


def load_vision_tower(
    spec: str, *, locked: bool = True, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """Load an image tower.

    spec: `timm:NAME` (weights from the hub), `timm:NAME@FILE` (a safetensors or state-dict file),
    `timm:local-dir:FOLDER`, `bigvision:FILE.npz` or `bigvision:FILE.npz@SIZE`,
    `open_clip:ARCHITECTURE@FILE` or `open_clip:local-dir:FOLDER`,
    `transformers:FOLDER_OR_HUB_NAME`, `vit_pytorch:NAME@FILE`, `dinov2s` (DINOv2 from a wheel),
    `dinov2s-flexi` (the same made flexible, the offline default), or a folder that was saved by
    this project. Raises `UsageError` for anything else.
    """
    from contrastive.vision import open_clip, timm, transformers  # others' formats

    loaders = {
        "timm": timm.load_timm,
        "bigvision": timm.load_bigvision,
        "open_clip": open_clip.load_open_clip,
        "transformers": transformers.load_transformers,
        "vit_pytorch": transformers.load_vit_pytorch,
    }
    kind, _, rest = spec.partition(":")
    if spec == "dinov2s":
        tower = timm.load_dinov2s()
    elif spec == "dinov2s-flexi":
        tower = timm.load_dinov2s_flexi()
    elif kind in loaders and rest:
        tower = loaders[kind](rest)
    elif (Path(spec) / "config.json").is_file():
        tower = _load_folder(Path(spec))
    else:
        raise UsageError(
            f"unknown image tower {spec!r}; allowed: timm:NAME, timm:NAME@FILE, "
            "timm:local-dir:FOLDER, bigvision:FILE.npz[@SIZE], open_clip:ARCHITECTURE@FILE, "
            "open_clip:local-dir:FOLDER, transformers:FOLDER_OR_HUB_NAME, vit_pytorch:NAME@FILE, "
            "dinov2s, dinov2s-flexi, or a folder with config.json"
        )
    tower.to(dtype)
    return tower.lock() if locked else tower
