"""Checkpoints of open_clip: what they were built from, and their tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from contrastive.distributed import is_main
from contrastive.files.weights import existing_file, read_weights, three_numbers
from data.errors import UsageError
from data.progress import say_once

LOCAL = "local-dir:"
OUR_RESIZING = {"crop": "shortest", "squash": "squash"}  # our names and theirs
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
LOOSE_TEXT_PARTS = (
    "token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection",
)  # fmt: skip


@dataclass(frozen=True)
class OpenClipCheckpoint:
    """A model of open_clip: its configuration, the pixels it expects, and its weights."""

    name: str
    model: dict[str, Any]  # embed_dim, vision_cfg, text_cfg, quick_gelu
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: dict[str, Tensor]
    resizing: tuple[str, str] = ("shortest", "bicubic")  # which side is fitted, interpolation
    folder: Path | None = None  # of which it was read

    @property
    def logits(self) -> tuple[float, float | None] | None:
        """(scale, bias) of the logits, the bias None for softmax; None where there are none."""
        if "logit_scale" not in self.weights:
            return None
        bias = self.weights.get("logit_bias")
        return float(self.weights["logit_scale"].exp()), None if bias is None else float(bias)

    def part(self, tower: str) -> dict[str, Tensor]:
        """Tensors of `visual` or `text`, without that prefix."""
        prefix = tower + "."
        own = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        if tower == "text" and not own:  # open_clip.CLIP has the parts at its top level
            own = {k: v for k, v in self.weights.items() if k.startswith(LOOSE_TEXT_PARTS)}
        return own


def architecture_config(name: str) -> dict[str, Any]:
    """What open_clip builds `name` from; `UsageError` where it has no such architecture."""
    import open_clip

    if name.startswith("hf-hub:"):
        raise UsageError(
            f"open_clip:{name} is not read; allowed: open_clip:ARCHITECTURE@TAG, which is "
            "downloaded, or open_clip:local-dir:FOLDER with a copy of the hub's"
        )
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        near = [m for m in open_clip.list_models() if m.startswith(name[:5])][:6]
        raise UsageError(
            f"unknown open_clip architecture {name!r}; close names: {', '.join(near) or 'none'}"
        )
    return config


def read_open_clip(spec: str) -> OpenClipCheckpoint:
    """`ARCHITECTURE@FILE`, `ARCHITECTURE@TAG` of published weights, which are downloaded, or
    `local-dir:FOLDER`, as open_clip's factory writes and reads them.

    A file does not say how pixels are resized and normalised: as all published weights of the
    architecture share it, else as OpenAI's. Nor does it say its activation, where weights of one
    architecture differ: the architecture's is taken, and said.
    """
    import open_clip
    from open_clip.pretrained import _PRETRAINED

    if spec.startswith(LOCAL):
        return _read_folder(Path(spec.removeprefix(LOCAL)))
    name, _, file = spec.partition("@")
    config = architecture_config(name)
    tags = _PRETRAINED.get(name, {})
    if not file:
        raise UsageError(
            f"open_clip:{name} names no weights; allowed: open_clip:{name}@FILE, or one of the "
            f"tags {', '.join(tags) or 'none'}"
        )
    if not Path(file).exists():
        if file in tags:
            return _download(name, file, config)
        raise UsageError(
            f"no such file: {file}, nor is it a tag of {name}: {', '.join(tags) or 'there is none'}"
        )
    published = tags.values()
    facts = {(tuple(p["mean"]), tuple(p["std"])) for p in published}
    default = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = facts.pop() if len(facts) == 1 else default
    resized = {(p["resize_mode"], p["interpolation"]) for p in published}
    resizing = resized.pop() if len(resized) == 1 else ("shortest", "bicubic")
    weights = _weights(existing_file(file))
    quick = [tag for tag, p in tags.items() if p.get("quick_gelu")]
    if quick and not config.get("quick_gelu") and is_main():
        say_once(  # both towers are read from one file
            f"open_clip:{name}@{file} is read with GELU; weights that were trained with QuickGELU "
            f"({', '.join(quick)}) are open_clip:{name}-quickgelu@{file}"
        )
    return OpenClipCheckpoint(name, config, mean, std, weights, resizing)


def _download(name: str, tag: str, config: dict[str, Any]) -> OpenClipCheckpoint:
    import open_clip

    facts: Any = open_clip.get_pretrained_cfg(name, tag)
    try:
        file = open_clip.download_pretrained(facts)
    except Exception as error:  # the hub's client raises many kinds
        raise UsageError(
            f"cannot download open_clip:{name}@{tag} ({type(error).__name__}); with a file at "
            f"hand say open_clip:{name}@FILE"
        ) from error
    config = {**config, "quick_gelu": facts.get("quick_gelu", config.get("quick_gelu", False))}
    resizing = facts["resize_mode"], facts["interpolation"]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return OpenClipCheckpoint(name, config, mean, std, _weights(Path(file)), resizing)


def _read_folder(folder: Path) -> OpenClipCheckpoint:
    import open_clip

    file = folder / "open_clip_config.json"
    try:
        facts = json.loads(file.read_text())
        pixels = facts.get("preprocess_cfg", {})
        mean = pixels.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = pixels.get("std", open_clip.OPENAI_DATASET_STD)
        resizing = pixels.get("resize_mode", "shortest"), pixels.get("interpolation", "bicubic")
        config = facts["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} is not an open_clip folder: {file.name}: {error}") from error
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UsageError(f"{folder} holds no weights; allowed: {' or '.join(WEIGHTS)}")
    mean, std = three_numbers(mean, f"mean of {file}"), three_numbers(std, f"std of {file}")
    weights = _weights(found[0])
    return OpenClipCheckpoint(LOCAL + folder.name, config, mean, std, weights, resizing, folder)


def _weights(file: Path) -> dict[str, Tensor]:
    weights = read_weights(file)
    # the prefix is DistributedDataParallel's
    return {name.removeprefix("module."): w for name, w in weights.items()}
