"""Optimiser, learning-rate schedule, and which parameters decay."""

import math
from typing import Any

import torch
from torch import nn

from contrastive.run.config import OptimConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases or the logit scale."""
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


def set_learning_rate(optimizer: Any, cfg: OptimConfig, step: int, steps: int) -> float:
    """Set the learning rate of step `step` of `steps` (from 0) in every group, and return it."""
    lr = learning_rate(cfg, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
