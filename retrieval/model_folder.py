"""Where a model is: a folder, or another library's checkpoint. Checked without torch."""

import shutil
from pathlib import Path

from contrastive.vision.config import is_library_spec
from data.errors import UsageError


def check_model_folder(model: str | Path) -> None:
    """Raises `UsageError` where `LitModel.from_pretrained` would find nothing to read."""
    if is_library_spec(str(model)):
        return
    if not model or not (Path(model) / "config.json").is_file():
        raise UsageError(
            f"no model at {str(model)!r}; name a folder with config.json and model.safetensors, or "
            "a CLIP or SigLIP: open_clip:ARCHITECTURE@FILE, open_clip:local-dir:FOLDER, "
            "transformers:FOLDER"
        )


def copy_model(model: str | Path, folder: Path) -> None:
    """A model's own folder as `folder`. Copied, not linked: one that is written again in place must
    not change the copy."""
    if not is_library_spec(str(model)):
        shutil.copytree(model, folder)
        return
    from contrastive.model.lit import LitModel

    LitModel.from_pretrained(model).save_pretrained(folder)
