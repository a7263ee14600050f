"""Image towers of timm: by name from the hub, from a file of weights, or from timm's folders."""

import json
from pathlib import Path
from typing import Any

import timm

from contrastive.files.weights import existing_file, load_weights, read_weights
from contrastive.vision.families import family_of
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


def load_timm(rest: str) -> VisionTower:
    """`NAME` (weights from the hub), `NAME@FILE` (safetensors or a state dict), or
    `local-dir:FOLDER` (timm's config.json and model.safetensors)."""
    if rest.startswith("local-dir:"):
        return _load_timm_folder(Path(rest.removeprefix("local-dir:")))
    name, _, file = rest.partition("@")
    path = existing_file(file) if file else None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:6]
        raise UsageError(f"unknown timm model {name!r}; close names: {', '.join(near) or 'none'}")
    try:
        net: Any = timm.create_model(name, pretrained=path is None)
    except Exception as error:  # the hub's client raises many kinds
        raise UsageError(
            f"cannot get the weights of timm:{name} ({type(error).__name__}); "
            f"with a file at hand say timm:{name}@FILE"
        ) from error
    if path is not None:
        load_weights(net, read_weights(path), path)
    return _timm_tower(net, name, {"num_classes": net.num_classes}, net.pretrained_cfg)


def _load_timm_folder(folder: Path) -> VisionTower:
    try:
        config = json.loads((folder / "config.json").read_text())
        name, facts = config["architecture"], config.get("pretrained_cfg", config)
        args = {**config.get("model_args", {}), "num_classes": config.get("num_classes", 1000)}
        net: Any = timm.create_model(name, pretrained=False, **args)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{folder} is not a timm folder: config.json: {error}") from error
    load_weights(net, read_weights(existing_file(str(folder / "model.safetensors"))), folder)
    return _timm_tower(net, name, args, net.pretrained_cfg | facts)


def _timm_tower(net: Any, name: str, args: dict[str, Any], facts: Any) -> VisionTower:
    config = TowerConfig(
        name=name,
        args=args,
        image_size=facts["input_size"][-1],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        positions=family_of(net).position_rule(net),
        fit="squash" if facts.get("crop_mode") == "squash" else "crop",
    )
    return VisionTower(net, config)
