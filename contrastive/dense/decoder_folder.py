"""A decoder's folder: config.json and model.safetensors, without the tower, which it names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.dense.config import DecoderConfig
from contrastive.dense.decoders import build_decoder
from contrastive.files.weights import (
    files_checked,
    load_weights,
    read_config,
    read_weights,
    write_config,
    write_weights,
)
from contrastive.vision.earlier import keep_transform
from contrastive.vision.feature_terms import OWN
from contrastive.vision.load import load_vision_tower
from contrastive.vision.patch_features import check_has_patches
from contrastive.vision.tower import VisionTower
from data.errors import UsageError


@dataclass(frozen=True)
class ClassTexts:
    """What heads of boxes are trained to find, as constants."""

    embeds: Float[np.ndarray, "k d"]
    """Of each class name, unit norm."""
    fingerprint: str
    """Of what made them of texts."""
    affine: tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]
    """Weight and bias of what brings a whole picture's features near the texts."""


@dataclass(frozen=True)
class TrainedDecoder:
    """A decoder, what its logits mean, and the tower whose patches it reads."""

    decoder: nn.Module
    cfg: DecoderConfig
    class_names: tuple[str, ...]
    """Of logits 1, 2, ...; logit 0 is background. Of boxes: what they were trained to find."""
    tower: VisionTower
    tower_spec: str
    features: str
    """Tower and features, as `load_vision_tower` takes them."""
    patch_sizes: tuple[int, ...]
    """Those it was trained at."""
    embed_dim: int = 0
    """Width of the texts' space, of boxes."""
    texts: str = ""
    """Fingerprint of what made the texts' vectors, of boxes."""


def in_widths(tower: VisionTower) -> list[int]:
    """Of the vectors that the features of a patch join. Raises `UsageError` for a tower without."""
    check_has_patches(tower)
    own = tower.embed_dim - (len(tower.terms) - 1) * tower.width
    return [own if term.token == OWN else tower.width for term in tower.terms]


def new_decoder(
    cfg: DecoderConfig,
    class_names: tuple[str, ...],
    tower: VisionTower,
    tower_spec: str,
    features: str,
    patch_sizes: tuple[int, ...],
    embed_dim: int = 0,
    texts: str = "",
) -> TrainedDecoder:
    """Not yet trained. Raises as `in_widths`."""
    decoder = build_decoder(cfg, in_widths(tower), len(class_names) + 1, embed_dim)
    return TrainedDecoder(
        decoder, cfg, class_names, tower, tower_spec, features, patch_sizes, embed_dim, texts
    )


def save_decoder(trained: TrainedDecoder, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the files that `load_decoder` reads. facts: more entries of config.json."""
    tower = trained.tower
    vision = {
        "tower": trained.tower_spec,
        "features": trained.features,
        "dtype": str(next(tower.parameters()).dtype).removeprefix("torch."),
        "fingerprint": tower.fingerprint,
    }
    config = {
        "format": 1, "decoder": asdict(trained.cfg), "class_names": trained.class_names,
        "patch_sizes": trained.patch_sizes, "vision": vision, **facts,
    }  # fmt: skip
    if trained.cfg.kind == "boxes":
        config["texts"] = {"embed_dim": trained.embed_dim, "fingerprint": trained.texts}
    write_weights(folder / "model.safetensors", trained.decoder.state_dict())
    write_config(folder, config)


def load_decoder(folder: str | Path, tower: VisionTower | None = None) -> TrainedDecoder:
    """Raises `UsageError` for what is no decoder's folder, and for another tower than it was
    trained on.

    tower: to share one that is loaded already; None loads the one that config.json names.
    """
    folder = Path(folder)
    config = read_config(folder, "decoder")
    with files_checked(folder, config):
        try:
            vision, names = config["vision"], tuple(config["class_names"])
            cfg = DecoderConfig(**config["decoder"])
            sizes = tuple(config["patch_sizes"])
            dtype = getattr(torch, vision["dtype"])
            spec, features = vision["tower"], vision["features"]
            fingerprint = vision["fingerprint"]
            space = config["texts"] if cfg.kind == "boxes" else {}
            width, made_by = space.get("embed_dim", 0), space.get("fingerprint", "")
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{folder}/config.json describes no decoder: {error!r}") from error
        if tower is None:
            tower = load_vision_tower(spec, dtype=dtype, features=features)
            keep_transform(tower, fingerprint, folder)
    if tower.fingerprint != fingerprint:
        raise UsageError(
            f"{folder} was trained on the tower {spec} with fingerprint {fingerprint}; this one "
            f"has {tower.fingerprint}, and its patches mean something else"
        )
    trained = new_decoder(cfg, names, tower, spec, features, sizes, width, made_by)
    load_weights(trained.decoder, read_weights(folder / "model.safetensors"), folder)
    trained.decoder.requires_grad_(False).eval()
    return trained
