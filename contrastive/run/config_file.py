"""A run's config.json: written and read again."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from contrastive.run.config import RunConfig
from data.errors import UsageError
from data.files import check_seal, check_there, sealed, write_json

# Names of 0.1.0 and what they are now, for saved configurations and for flags.
RENAMED = {
    "zero.text_chunk": "zero.micro_batch_size",
    "start_samples": "init_samples",
    "loss.start_scale": "loss.temperature_init",
    "loss.start_bias": "loss.bias_init",
    "loss.standard_samples": "loss.normaliser_samples",
    "tokens.keep": "patch_dropout.keep_rate",
    "tokens.keep_end": "patch_dropout.keep_rate_end",
    "tokens.schedule": "patch_dropout.schedule",
    "tokens.cycle_steps": "patch_dropout.cycle_steps",
}

# Fields that earlier configurations lack, and what those runs had.
ADDED = {
    "vision.features": "own",
    "teacher.features": "own",
    "embed_dim": 0,
    "vision.fit": None,
    "vision.head": "none",
    "student.max_aspect": 1.0,
    "data.captions_per_image": 1,
    "text.frozen": False,
    "text.head": "none",
    "text.trainable": (),
    "text.decay_to_start": 0.0,
    "text.lora": 0,
}

Config = TypeVar("Config", bound=RunConfig)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses to {"data.shards": ...}."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = value
    return out


def update(values: dict[str, Any]) -> None:
    """Give a saved configuration's old names their new ones, and it what it lacks, in place."""
    for old, new in RENAMED.items():
        group, name = _group_of(values, old)
        if name in group:
            target, new_name = _group_of(values, new)
            target[new_name] = group.pop(name)
    for new, value in ADDED.items():
        group, name = _group_of(values, new)
        group.setdefault(name, value)


def _group_of(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    *groups, name = dotted.split(".")
    for group in groups:
        values = values.setdefault(group, {})
    return values, name


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Rebuild nested dataclasses from JSON; lists become the tuples they were."""
    hints = typing.get_type_hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        value = values[f.name]
        if dataclasses.is_dataclass(hints[f.name]):
            value = from_dict(typing.cast(type, hints[f.name]), value)
        elif isinstance(value, list):
            value = tuple(value)
        out[f.name] = value
    return cls(**out)


def save_config(cfg: RunConfig, folder: Path, resumed: bool = False) -> None:
    """Write config.json with the resolved configuration, the git revision, and the command that
    began the run."""
    file = folder / "config.json"
    typed = command()
    if resumed:
        typed = json.loads(file.read_text()).get("command", typed)
    values: dict[str, Any] = {"format": 1, "revision": revision(), "command": typed}
    values["train"] = dataclasses.asdict(cfg)
    write_json(file, sealed(values))


def load_config(folder: Path, cls: type[Config]) -> Config:
    """Read a run folder's config.json; `UsageError` for a run of another kind, and where it is not
    what was written. Version 0.1 wrote no digest."""
    check_there(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no config.json")
    try:
        saved = json.loads(file.read_text())
        if "train" not in saved and (folder.parent / "checkpoints").is_dir():
            run = folder.parent
            raise UsageError(f"{folder} is not a run folder; it is the model of the run {run}")
        check_seal(file, saved)
        values = saved["train"]
        update(values)
        return from_dict(cls, values)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} is not a run folder: config.json: {error}") from error


def command() -> str:
    """What was typed, once the launcher's rank is taken off (`init_from_launcher`)."""
    return shlex.join(["deepspeed" if "RANK" in os.environ else "python", *sys.argv])


def revision() -> str:
    """The git revision of this code, `-dirty` when files differ; `unknown` outside a checkout."""
    where = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=10)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
