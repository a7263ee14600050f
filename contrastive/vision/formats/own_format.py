"""Image towers in this project's own folders: config.json and model.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive.files.weights import (
    files_checked,
    load_weights,
    read_config,
    read_weights,
    write_config,
    write_weights,
)
from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


def save_vision_tower(
    tower: VisionTower, folder: str | Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write the folder that `load_vision_tower(folder)` reads.

    facts: more entries of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": 1, "vision": tower.describe(), **(facts or {})}
    write_weights(folder / "model.safetensors", tower.state_dict())
    write_config(folder, config)


def load_saved_tower(folder: Path) -> VisionTower:
    """The tower of a folder that `save_vision_tower` wrote, or a whole model's image tower."""
    config = read_config(folder, "vision")
    with files_checked(folder, config):
        try:
            tower = build_vision_tower(TowerConfig.from_json(config["vision"]))
        except UsageError as error:
            raise UsageError(f"{folder}/config.json: {error}") from error
    weights = read_weights(folder / "model.safetensors")
    prefix = "vision."  # of the image tower in a whole model
    if any(name.startswith(prefix) for name in weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    load_weights(tower, weights, folder)
    return tower
