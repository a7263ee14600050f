"""The configuration of a training run, and its JSON."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from contrastive.model.lit import LossConfig
from contrastive.run.optim import OptimConfig
from contrastive.run.zero import ZeroConfig
from contrastive.text.tower import TextConfig
from data.errors import UsageError
from data.pipeline.captioned import DataConfig


@dataclass(frozen=True)
class VisionConfig:
    """The locked image tower and the patch sizes that training draws."""

    tower: str = "dinov2s"
    """dinov2s, dinov2s-flexi, timm:NAME[@FILE], open_clip:ARCHITECTURE@FILE, transformers:FOLDER, a
    folder, or what else contrastive.load_vision_tower reads."""
    patch_sizes: tuple[int, ...] = ()
    """One is drawn per step, for all ranks. Empty: all that the tower offers."""
    patch_weights: tuple[float, ...] = ()
    """How often each patch size is drawn, relative to the others. Empty: equally often."""
    dtype: Literal["float32", "bfloat16", "fastest"] = "float32"
    """Of the tower's weights. bfloat16 moves features by about 1e-2; fastest: bfloat16 where the
    GPU or CPU computes in it."""

    def __post_init__(self) -> None:
        check_patch_weights("--vision", self.patch_sizes, self.patch_weights)


def check_patch_weights(flags: str, sizes: Sequence[int], weights: Sequence[float]) -> None:
    """Raise `UsageError` unless there is no weight, or one for each size."""
    if weights and len(weights) != len(sizes):
        raise UsageError(
            f"{flags}.patch-weights has {len(weights)} values for "
            f"{len(sizes)} {flags}.patch-sizes; give one for each"
        )
    if any(w < 0 for w in weights) or (weights and not sum(weights)):
        raise UsageError(f"{flags}.patch-weights must be at least 0, and not all 0")


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    name: str = "run"
    """The run's folder is OUT/NAME."""
    out: str = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    global_batch_size: int = 256
    """Samples per optimiser step, all ranks together."""
    steps: int = 1000
    """Optimiser steps."""
    seed: int = 0
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0: none."""
    checkpoint_every: int = 0
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """The newest that are kept."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file to merge over ours."""

    def __post_init__(self) -> None:
        for flag in ("steps", "log_every", "keep_checkpoints", "global_batch_size"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: at least 1")
        for flag in ("eval_every", "checkpoint_every"):
            if getattr(self, flag) < 0:
                raise UsageError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: at least 0")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: at least 0")
        if self.data.num_workers < 0:
            raise UsageError(f"--data.num-workers {self.data.num_workers}: at least 0")
        if self.data.block_shards < 1:
            raise UsageError(f"--data.block-shards {self.data.block_shards}: at least 1")
        if self.data.weights and len(self.data.weights) != len(self.data.shards):
            raise UsageError(
                f"--data.weights has {len(self.data.weights)} values for "
                f"{len(self.data.shards)} --data.shards; give one for each"
            )
        if self.optim.warmup_steps > self.steps:
            raise UsageError(
                f"--optim.warmup-steps {self.optim.warmup_steps}: at most --steps {self.steps}"
            )
        if self.optim.cooldown_steps > self.steps - self.optim.warmup_steps:
            raise UsageError(
                f"--optim.cooldown-steps {self.optim.cooldown_steps}: at most the "
                f"{self.steps - self.optim.warmup_steps} steps after the warm-up"
            )

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training run of a text tower against a locked image tower."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    start_samples: int = 4096
    """Training samples from which the whitening of the features and the start of the text
    projection are solved; 0: no whitening, a random projection."""
    eval_data: tuple[str, ...] = ()
    """NAME:ROOT, data sets of launch/zeroshot.py to evaluate while training; a folder alone holds
    shards."""
    eval_patch_sizes: tuple[int, ...] = ()
    """Of those evaluations. Empty: the coarsest patch size that is trained."""
    compile: bool = False
    """torch.compile both towers: a minute at the start, for the gain in benchmarks/results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_samples < 0:
            raise UsageError(f"--start-samples {self.start_samples}: at least 0")


# What --resume may change: neither the model, nor the loss, nor the order of the data.
CHANGEABLE = {
    "data.num_workers", "data.features", "data.on_error", "data.index_dir",
    "data.max_pixels", "zero.offload", "zero.text_chunk", "log_every", "eval_every", "eval_data",
    "eval_patch_sizes", "val_shards", "val_samples", "checkpoint_every", "keep_checkpoints",
    "compile", "deepspeed_config",
}  # fmt: skip


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


def check_resumable(saved: RunConfig, asked: RunConfig) -> None:
    """Refuse a resume that would alter the model, the loss or the order of the data."""
    before, after = flatten(saved), flatten(asked)
    for name, value in after.items():
        if name not in CHANGEABLE and value != before[name]:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {value} cannot change on resume: the run was started with {before[name]}"
            )


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
    values = {"format": 1, "revision": revision(), "command": typed}
    values["train"] = dataclasses.asdict(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def load_config(folder: Path, cls: type[Config]) -> Config:
    """Read a run folder's config.json; `UsageError` for a run of another kind."""
    try:
        values = json.loads((folder / "config.json").read_text())
        return from_dict(cls, values["train"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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
