"""Reading weights and their configuration: tensors only, never unpickled code."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import UsageError


def existing_file(path: str) -> Path:
    """Raise `UsageError` unless the file exists."""
    if not Path(path).is_file():
        raise UsageError(f"no such file: {path}")
    return Path(path)


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A folder's config.json of format 1 that describes `part`, else `UsageError`."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a model folder: config.json: {error}") from error
    if not isinstance(config, dict) or config.get("format") != 1 or part not in config:
        raise UsageError(f"{folder}/config.json does not describe a model of format 1")
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a state dict without pickled code; `UsageError` else."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights: Any = torch.load(file, map_location="cpu", weights_only=True)
        return weights.get("state_dict", weights)
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UsageError(
            f"{file} cannot be read as weights ({type(error).__name__}); allowed: safetensors, or "
            "a state dict of tensors alone"
        ) from error


def three_numbers(values: Any, what: str) -> tuple[float, float, float]:
    """A mean or a deviation of red, green and blue; `UsageError` for anything else."""
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(n, int | float) for n in numbers):
        raise UsageError(f"{what} is {values}; allowed: three numbers")
    return tuple(numbers)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """`load_state_dict`, strict; `UsageError` if the weights belong to another model."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{source} holds the weights of another model: {reason}") from error
