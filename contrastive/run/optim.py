"""Optimiser, learning-rate schedule, and which parameters decay."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from data.errors import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser. The defaults follow LiT's and SigLIP's small-scale recipes."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """adafactor (arXiv:1804.04235) keeps rows' and columns' means instead of each second moment;
    its betas and eps are torch's own."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up: a cosine down to the end, or constant and then a linear cool-down
    (arXiv:2106.04560)."""
    cooldown_steps: int = 0
    """The last steps, in which a linear schedule falls; 0: all after the warm-up."""
    weight_decay: float = 0.01
    """Of matrices; norms, biases and the temperature are spared."""
    head_weight_decay: float | None = None
    """Of the last layer (`head`, `projection`): large ViTs take more there (arXiv:2106.04560).
    As weight_decay when not given."""
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
                raise UsageError(f"--optim.{name} {value}: must be above 0")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UsageError(f"--optim.{name} {value}: allowed are values from 0 up to 1")
        for name in (
            "min_lr", "weight_decay", "head_weight_decay", "warmup_steps", "cooldown_steps",
            "clip_norm",
        ):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                flag = name.replace("_", "-")
                raise UsageError(f"--optim.{flag} {getattr(self, name)}: must be at least 0")
        if self.cooldown_steps and self.schedule != "linear":
            raise UsageError("--optim.cooldown-steps needs --optim.schedule linear")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases or the temperature."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def in_head(name: str) -> bool:
    """Whether a parameter belongs to the last layer: a class head, or a text projection."""
    return not {"head", "projection"}.isdisjoint(name.split("."))


def build_optimizer(cfg: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters in groups: decayed, spared, and the
    head's decayed ones where they have a decay of their own."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    decayed = [(n, p) for n, p in named if decays(n, p)]
    head = [p for n, p in decayed if in_head(n)] if cfg.head_weight_decay is not None else []
    body = [p for n, p in decayed if not (head and in_head(n))]
    groups: list[dict[str, Any]] = [
        {"params": body, "weight_decay": cfg.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    if head:
        groups.append({"params": head, "weight_decay": cfg.head_weight_decay})
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr)
    if cfg.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=cfg.lr)
    betas = (cfg.beta1, cfg.beta2)
    # fused: one pass over the memory, on CPUs five times as fast as a loop over parameters
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then the schedule down to `min_lr` at `steps`; `step` counts from 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    falling = (steps - cfg.warmup_steps) if cfg.schedule == "cosine" else cfg.cooldown_steps
    falling = falling or steps - cfg.warmup_steps
    progress = min(1.0, max(0.0, step - (steps - falling)) / max(1, falling))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * share
