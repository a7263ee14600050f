"""Checks and prepares a run's folder."""

import shutil
import sys
from pathlib import Path
from typing import Any

from contrastive import distributed
from contrastive.run.checkpoint import complete_checkpoints, newest_checkpoint
from contrastive.run.config import RunConfig
from contrastive.run.config_file import load_config, save_config
from contrastive.run.optim import learning_rate
from data.errors import UsageError


def find_checkpoint(cfg: RunConfig, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint when resuming, else None. All ranks call it.

    Raises `UsageError`, on all ranks, when there is none, or one in the way. Damaged ones are
    named, and an older good one is used.
    """
    return distributed.from_main(lambda: _find_checkpoint(cfg, resume))


def _find_checkpoint(cfg: RunConfig, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    folder = cfg.folder / "checkpoints"
    if not resume:
        if complete := complete_checkpoints(folder):
            raise UsageError(
                f"{cfg.folder} holds a run of {int(complete[-1].name[5:])} steps; give another "
                f"name, or resume={cfg.folder}"
            )
        return None
    damaged: list[str] = []
    checkpoint = newest_checkpoint(folder, damaged.append)
    if checkpoint is None and damaged:
        raise UsageError(
            f"{cfg.folder} has no good checkpoint to resume from: {'; '.join(damaged)}"
        )
    if checkpoint is None:
        raise UsageError(f"{cfg.folder} has no complete checkpoint to resume from")
    if notice := steps_notice(load_config(cfg.folder, type(cfg)), cfg, int(checkpoint[1]["step"])):
        print(notice, file=sys.stderr, flush=True)
    for sentence in damaged:
        print(f"{sentence}; going on from {checkpoint[0].name}", file=sys.stderr, flush=True)
    return checkpoint


def steps_notice(saved: RunConfig, cfg: RunConfig, done: int) -> str:
    """What a resume with another number of steps changes; "" where the steps done would have been
    the same. Raises `UsageError` where more are done already."""
    if cfg.steps < done:
        raise UsageError(f"steps {cfg.steps}: at least the {done} that the run has done")
    before, now = (
        [learning_rate(cfg.optim, step, steps) for step in range(done + 1)]
        for steps in (saved.steps, cfg.steps)
    )
    dropout = getattr(cfg, "patch_dropout", None)
    if before[:done] == now[:done] and (dropout is None or dropout.schedule != "linear"):
        return ""
    return (
        f"steps {cfg.steps}, begun with {saved.steps}: from here on the learning rate is that of "
        f"{cfg.steps} steps, {now[done]:.3g} where it was {before[done]:.3g}; weights will not be "
        f"those of a run begun with {cfg.steps}"
    )


def claim_folder(
    cfg: RunConfig,
    checkpoint: tuple[Path, dict[str, Any]] | None,
    identity: dict[str, Any],
    solved: str = "",
) -> None:
    """Make the run folder, or check that what is in it was made of the same towers and data.

    identity: fingerprints of what the run is made of. solved: the file of what a run solves before
    its first step, deleted where an earlier run never reached a checkpoint; "": none.
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
        if checkpoint is None:  # left by a run that never reached a checkpoint
            for name in filter(None, (solved, "metrics.jsonl")):
                (cfg.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(cfg.folder / name, ignore_errors=True)
        save_config(cfg, cfg.folder, resumed=checkpoint is not None)
    distributed.barrier()
