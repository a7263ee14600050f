"""Untrained networks and towers, by a library's name and arguments for them."""

from typing import Any

from contrastive.part_imports import timm_model
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


def build_vision_tower(config: TowerConfig) -> VisionTower:
    """An untrained tower of this architecture."""
    return VisionTower(build_net(config.library, config.name, config.args), config)


def build_net(library: str, name: str, args: dict[str, Any]) -> Any:
    """An untrained network of `library`; `UsageError` where timm has none of that name."""
    if library == "transformers":
        from transformers import AutoConfig, AutoModel

        return AutoModel.from_config(AutoConfig.for_model(name, **args))
    if library == "open_clip":
        return _open_clip_net(args)
    if library == "vit_pytorch":
        return _vit_pytorch_net(name, args)
    try:
        return timm_model(name, pretrained=False, **args)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"unknown tower {name!r}: {error}") from error


def _open_clip_net(args: dict[str, Any]) -> Any:
    from open_clip.model import _build_vision_tower

    net: Any = _build_vision_tower(**args)
    net.output_dim = args["embed_dim"]
    if hasattr(net, "trunk") and hasattr(net.trunk, "set_input_size"):
        net.set_input_size(args["vision_cfg"].get("image_size", 224))
    return net


def _vit_pytorch_net(name: str, args: dict[str, Any]) -> Any:
    try:
        from vit_pytorch import cct
    except ImportError as error:
        raise UsageError(
            "Compact Convolutional Transformers need the package vit-pytorch; "
            "run: pip install vit-pytorch"
        ) from error
    from torch.nn import Identity

    net = getattr(cct, name)(**args)
    net.classifier.fc = Identity()  # the class head
    return net
