"""Model folders by their names on a hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from data.errors import UsageError


def local_folder(folder: str | Path, hub: dict[str, Any]) -> Path:
    """The folder, or a copy of what the hub has under this name.

    hub: what `snapshot_download` takes. Raises `UsageError` where the hub does not give it.
    """
    if Path(folder).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        return Path(folder)
    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(str(folder), allow_patterns=wanted, **hub))
    except Exception as error:  # the hub's client raises many kinds
        raise UsageError(
            f"{folder} is not a model folder, nor does the hub give a model of that name "
            f"({type(error).__name__})"
        ) from error
