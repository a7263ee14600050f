"""Reading weights and their configuration: tensors only, never unpickled code."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from data.errors import UsageError
from data.files import bytes_digest, check_seal, file_digest, sealed


def existing_file(path: str) -> Path:
    """Raise `UsageError` unless the file exists."""
    if not Path(path).is_file():
        raise UsageError(f"no such file: {path}")
    return Path(path)


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A folder's config.json of format 1 that describes `part`, else `UsageError`, which says what
    a run and a decoder are."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a model folder: config.json: {error}") from error
    if not isinstance(config, dict) or config.get("format") != 1 or part not in config:
        why = f"{folder}/config.json does not describe a model of format 1"
        if (folder / "model" / "config.json").is_file():
            why += f"; of a run, the model is {folder / 'model'}"
        elif isinstance(config, dict) and "decoder" in config:
            why += "; it is a decoder's (launch/dense.py), which TrainedSegmenter reads"
        raise UsageError(why)
    check_seal(folder / "config.json", config)
    return config


@contextmanager
def files_checked(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Reads the files of a config.json meanwhile. Raises `UsageError` at the end for a damaged one,
    whatever happened. Models by 0.1.0 have no digests, and are not checked."""
    with ThreadPoolExecutor(1, "check") as pool:
        checked = pool.submit(_check_files, folder, config.get("files", {}))
        try:
            yield
        finally:
            checked.result()


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    for name, noted in digests.items():
        file = folder / name
        if file.is_file() and file_digest(file) != noted:
            raise UsageError(f"{file} is damaged: it is not what was saved")


def hash_weights(digest: Any, weights: Mapping[str, Tensor]) -> None:
    """Feed the names, dtypes and bytes of tensors, in the order of their names, to one of
    hashlib's digests."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Of any dtype and device, without gradient; bfloat16 too, which numpy lacks."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file. Raises `UsageError` where the disk does not take it."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be written: {error}") from error


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json, when everything else is in the folder: it holds digests of the files, but the
    README, and of itself: `files_checked`, `read_config`."""
    files = {
        file.name: file_digest(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in ("README.md", "config.json")
    }
    text = json.dumps(sealed({**config, "files": files}), indent=2) + "\n"
    (folder / "config.json").write_text(text)


def sealed_tensors(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with `facts` as its metadata, and among them a digest of it all."""
    facts = dict(facts or {})
    return save(dict(tensors), {**facts, "blake2b": _tensors_digest(tensors, facts)})


def read_sealed_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of `sealed_tensors`; `UsageError` for a damaged file. A file without a
    digest, as 0.1.0 wrote them, is not checked."""
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    noted = facts.pop("blake2b", None)
    if noted is not None and noted != _tensors_digest(tensors, facts):
        raise UsageError(f"{file} is damaged: it is not what was saved")
    return tensors, facts


def _tensors_digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    parts = [json.dumps(facts, sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [name.encode(), tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return bytes_digest(*parts)


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
