"""What every training run has, whatever it trains: steps, optimiser, ZeRO."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser. The defaults follow LiT's and SigLIP's small-scale recipes."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """adafactor (arXiv:1804.04235) factors the second moments; it uses torch's betas and eps."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up: cosine, or constant with a linear cool-down (arXiv:2106.04560)."""
    cooldown_steps: int = 0
    """Last steps, over which a linear schedule falls; 0: all steps after the warm-up."""
    weight_decay: float = 0.01
    """For matrices; norms, biases and the logit scale have none."""
    head_weight_decay: float | None = None
    """For the last layer (`head`, `projection`): large ViTs take more there (arXiv:2106.04560).
    Not given: weight_decay."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 0
    """Steps of linear warm-up, part of the run's steps."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value < math.inf:
                raise UsageError(f"optim.{name} {value}: must be above 0")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UsageError(f"optim.{name} {value}: allowed are values from 0 up to 1")
        for name in (
            "min_lr", "weight_decay", "head_weight_decay", "warmup_steps", "cooldown_steps",
            "clip_norm",
        ):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                raise UsageError(f"optim.{name} {getattr(self, name)}: must be at least 0")
        if self.cooldown_steps and self.schedule != "linear":
            raise UsageError("optim.cooldown_steps needs optim.schedule linear")


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed shards and computes what is trained."""

    stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: the optimiser's state, and at stage 3 the parameters too, stay in host memory."""
    precision: Literal["float32", "bfloat16", "fastest"] = "float32"
    """bfloat16: float32 parameters, linear layers computed in bfloat16.
    fastest: bfloat16 where the GPU or CPU supports it, else float32."""
    micro_batch_size: int = 0
    """Texts (flexify: images) per forward on a rank; bounds memory, not the result.
    With 0, as many as fit and help (flexify: the rank's whole share)."""


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    name: str = "run"
    """The run's folder is OUT/NAME."""
    out: str = "runs"
    """Folder of all runs."""
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
    """Steps between evaluations; one is always made at the end, where there is data for it."""
    checkpoint_every: int = 0
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file to merge over ours."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_checkpoints", "global_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: at least 1")
        for name in ("eval_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)}: at least 0")
        falling = self.steps - self.optim.warmup_steps
        if falling < 0:
            raise UsageError(
                f"optim.warmup_steps {self.optim.warmup_steps}: at most steps={self.steps}"
            )
        if self.optim.cooldown_steps > falling:
            raise UsageError(
                f"optim.cooldown_steps {self.optim.cooldown_steps}: at most the {falling} steps "
                "after the warm-up"
            )

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    def eval_due(self, step: int) -> bool:
        """Whether an evaluation follows the step, counted from 1."""
        every = self.eval_every
        return step == self.steps or bool(every and step % every == 0)

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint follows the step, counted from 1."""
        every = self.checkpoint_every
        return step == self.steps or bool(every and step % every == 0)
