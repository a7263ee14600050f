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
    return not in_tower(name) and not {"head", "projection"}.isdisjoint(name.split("."))


def in_tower(name: str) -> bool:
    """Whether a parameter belongs to a tower that came with weights of its own."""
    return "tower" in name.split(".")


def build_optimizer(
    cfg: OptimConfig, module: nn.Module, decay_to_start: float = 0.0
) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters in groups: decayed, spared, and the
    head's decayed ones where they have a decay of their own.

    decay_to_start: of the tower's parameters, in place of the decay (`DecayToStart`); 0: none.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    held = [p for n, p in named if in_tower(n)] if decay_to_start else []
    named = [(n, p) for n, p in named if not (held and in_tower(n))]
    decayed = [(n, p) for n, p in named if decays(n, p)]
    head = [p for n, p in decayed if in_head(n)] if cfg.head_weight_decay is not None else []
    body = [p for n, p in decayed if not (head and in_head(n))]
    groups: list[dict[str, Any]] = [
        {"params": body, "weight_decay": cfg.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    if head:
        groups.append({"params": head, "weight_decay": cfg.head_weight_decay})
    if held:
        groups.append({"params": held, "weight_decay": 0.0, "decay_to_start": decay_to_start})
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr)
    if cfg.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=cfg.lr)
    betas = (cfg.beta1, cfg.beta2)
    # fused: one pass over the memory, on CPUs five times as fast as a loop over parameters
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)


class DecayToStart:
    """Weight decay towards the weights that an engine is built with, instead of 0 (L2-SP, Li et
    al., arXiv:1802.01483): before a step they move there by lr * decay_to_start of the difference.

    Decoupled as AdamW's own decay. The start is kept as ZeRO holds the weights, sharded in stages 1
    to 3; a run that is resumed builds its engine from the same weights before it loads others.
    """

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        # in stage 3 the optimiser has parameters only while it steps
        weights = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        if weights is None:
            held = [g for g in inner.param_groups if g.get("decay_to_start")]
            weights = [p for group in held for p in group["params"]]
        self._start = {weight: weight.detach().clone() for weight in weights}
        inner.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            share = group["lr"] * group.get("decay_to_start", 0.0)
            for weight in group["params"] if share else ():
                weight.lerp_(self._start[weight], share)


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
