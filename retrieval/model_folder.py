"""Whether a folder holds a model, checked without torch."""

from pathlib import Path

from data.errors import UsageError


def check_model_folder(folder: str | Path) -> None:
    """Raises `UsageError` where `LitModel.from_pretrained` would find nothing to read."""
    if not folder or not (Path(folder) / "config.json").is_file():
        raise UsageError(
            f"no model at {str(folder)!r}; name a folder with config.json and model.safetensors"
        )
