"""A model's config.json: what a `LitModel` is made of, and its parts made of that again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contrastive.model.config import LossConfig
from contrastive.model.head import ImageHead
from contrastive.model.text_side import TextSide
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import build_text_tower
from contrastive.vision.build import build_vision_tower
from contrastive.vision.config import Head
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig


def describe_parts(
    vision: VisionTower,
    text: TextSide,
    embed_dim: int,
    head: ImageHead | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What `build_parts` reads, and facts, which are more entries."""
    config = {
        "format": 1,
        "vision": vision.describe(),
        "vision_dtype": str(next(vision.parameters()).dtype).removeprefix("torch."),
        "text": text.encoder.tower.config(),
        "loss": text.loss.as_json(),
        **facts,
    }
    if embed_dim != vision.embed_dim:
        config["embed_dim"] = embed_dim
    if head is not None:
        config["head"] = head.kind
    if text.encoder.head is not None:
        config["text_head"] = text.encoder.head.kind
    return config


def build_parts(folder: Path, config: Mapping[str, Any]) -> tuple[VisionTower, TextSide, int, Head]:
    """What `LitModel` takes, the image tower locked, without the weights of `folder`.

    Raises `KeyError`, `TypeError`, `AttributeError` and `OSError` where the configuration or the
    tokenizer's files are not whole.
    """
    vision = build_vision_tower(TowerConfig.from_json(config["vision"]))
    vision.to(getattr(torch, config["vision_dtype"]))
    width = config.get("embed_dim", vision.embed_dim)
    tower = build_text_tower(config["text"], folder)
    encoder = TextEncoder(tower, width, config.get("text_head", "none"))
    text = TextSide(encoder, LossConfig.from_json(config["loss"]))
    return vision.lock(), text, width, config.get("head", "none")
