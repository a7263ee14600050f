"""Where a model is: a folder, or another library's checkpoint. Checked without torch."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from contrastive.vision.config import is_library_spec
from data.errors import UsageError

if TYPE_CHECKING:
    from contrastive.model.lit import LitModel


def check_model_folder(model: str | Path) -> None:
    """Raises `UsageError` where `LitModel.from_pretrained` would find nothing to read."""
    if is_library_spec(str(model)):
        return
    of_run = Path(model) / "model"
    if model and (of_run / "config.json").is_file():
        raise UsageError(f"{model} is no model; of a run, it is {of_run}")
    if not model or not (Path(model) / "config.json").is_file():
        raise UsageError(
            f"no model at {str(model)!r}; name a folder with config.json and model.safetensors, or "
            "a CLIP or SigLIP: open_clip:ARCHITECTURE@FILE, open_clip:local-dir:FOLDER, "
            "transformers:FOLDER"
        )


def decoder_kind(model: str | Path) -> str:
    """What kind of decoder launch/dense.py trained that it is the folder of; "" for any other."""
    try:
        return str(json.loads((Path(model) / "config.json").read_text())["decoder"]["kind"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def load_model(name: str | Path, device: str) -> "LitModel":
    """A model, on a GPU where there is one and `device` allows it."""
    import torch

    from contrastive.model.lit import LitModel

    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return LitModel.from_pretrained(name, device=where)


def to_copy(name: str | Path, model: "LitModel") -> "Path | LitModel":
    """What `copy_model` copies of a model that was loaded by `name`: its folder, if it has one."""
    return model if is_library_spec(str(name)) else Path(name)


def copy_model(model: "Path | LitModel", folder: Path) -> None:
    """A model as `folder`. Copied, not linked: one that is written again in place must not change
    the copy."""
    if isinstance(model, Path):
        shutil.copytree(model, folder)
    else:
        model.save_pretrained(folder)
