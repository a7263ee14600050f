"""Paragraphs that the training loops share: the run's folder, the step's patch size."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from contrastive import distributed
from contrastive.run.checkpoint import newest_checkpoint
from contrastive.run.config import RunConfig
from contrastive.run.config_file import save_config
from contrastive.run.log import DIVERGED
from data.errors import DataError, UsageError


def draw_patch_size(
    patch_sizes: Sequence[int], weights: Sequence[float], seed: int, step: int
) -> int:
    """The patch size of a step: the same on all ranks, a pure function of (seed, step).

    weights: relative, one for each size; none: all alike.
    """
    shares = np.asarray(weights or [1.0] * len(patch_sizes), dtype=float)
    position = np.random.PCG64([seed, step, 0x9A7C4]).random_raw() / 2.0**64
    return int(patch_sizes[int((shares.cumsum() / shares.sum() <= position).sum())])


def find_checkpoint(cfg: RunConfig, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint when resuming; `UsageError` when there is none, or one in the way."""
    checkpoint = newest_checkpoint(cfg.folder / "checkpoints")
    if resume and checkpoint is None:
        raise UsageError(f"{cfg.folder} has no complete checkpoint to resume from")
    if not resume and checkpoint:
        raise UsageError(
            f"{cfg.folder} holds a run of {checkpoint[1]['step']} steps; give another --name, "
            f"or --resume {cfg.folder}"
        )
    return checkpoint


def claim_folder(
    cfg: RunConfig,
    checkpoint: tuple[Path, dict[str, Any]] | None,
    identity: dict[str, Any],
    solved: str,
) -> None:
    """Make the run folder, or check that what is in it was made of the same towers and data.

    solved: the file of what a run solves before its first step.
    """
    for name, value in identity.items() if checkpoint else ():
        saved = checkpoint[1][name] if checkpoint else None
        if saved != value:
            raise UsageError(
                f"{cfg.folder} was trained with {name.replace('_', ' ')} {saved}, now it is "
                f"{value}; restore it, or start a new run"
            )
    distributed.barrier()  # every rank has looked before one of them writes
    if distributed.is_main():
        if checkpoint is None:  # what a run left that never reached a checkpoint
            for name in (solved, "metrics.jsonl"):
                (cfg.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(cfg.folder / name, ignore_errors=True)
        save_config(cfg, cfg.folder, resumed=checkpoint is not None)
    distributed.barrier()


def check_finite(step: int, module: nn.Module) -> None:
    """Raises `DataError` where a parameter is not finite: such a model is not saved."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(f"step {step}: {name} is not finite; {DIVERGED}")


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within this context every rank holds whole parameters, also under ZeRO-3."""
    import deepspeed

    sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield
