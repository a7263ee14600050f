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

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step of the cosine."""
    weight_decay: float = 0.01
    """Of matrices; norms, biases and the temperature are spared."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 0
    """Steps of linear warm-up, part of the run's steps."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not value > 0:
                raise UsageError(f"--optim.{name} {value}: must be above 0")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise UsageError(f"--optim.{name} {value}: allowed are values from 0 up to 1")
        for name in ("min_lr", "weight_decay", "warmup_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                flag = name.replace("_", "-")
                raise UsageError(f"--optim.{flag} {getattr(self, name)}: must be at least 0")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases or the temperature."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def build_optimizer(cfg: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters in two groups, decayed and spared."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": cfg.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr)
    betas = (cfg.beta1, cfg.beta2)
    # fused: one pass over the memory, on CPUs five times as fast as a loop over parameters
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)


def learning_rate(cfg: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to `min_lr` at `steps`; `step` counts from 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
