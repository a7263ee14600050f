"""Checkpoints in DeepSpeed's format, resumed by the same or another number of ranks.

`checkpoints/step_00000100/` is DeepSpeed's folder (its files are pickles: load only your own runs);
`state.json` beside them is written last, so a folder without it was interrupted and is ignored.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import nn

from contrastive import distributed
from contrastive.run.config import OptimConfig
from contrastive.run.log import DIVERGED
from contrastive.run.zero import build_engine
from data.errors import DataError, UsageError

STATE = "state.json"


def check_finite(step: int, module: nn.Module) -> None:
    """Raise `DataError` where a parameter is not finite: such a model is not saved."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(f"step {step}: {name} is not finite; {DIVERGED}")


def save_checkpoint(engine: Any, folder: Path, step: int, keep: int, extra: dict[str, Any]) -> None:
    """Save after `step` optimiser steps and drop all but the newest `keep`. All ranks call it."""
    tag = f"step_{step:08d}"
    if distributed.is_main():  # what a kill in mid-save left, of any number of ranks
        for left in [d for d in folder.glob("step_*") if not (d / STATE).exists()]:
            shutil.rmtree(left)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    distributed.barrier()
    if distributed.is_main():
        state = {"format": 1, "step": step, "world_size": distributed.world_size(), **extra}
        temporary = folder / tag / (STATE + ".tmp")
        temporary.write_text(json.dumps(state) + "\n")
        temporary.rename(folder / tag / STATE)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def _complete(folder: Path) -> list[Path]:
    return sorted(state.parent for state in folder.glob(f"step_*/{STATE}"))


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its state, or None."""
    complete = _complete(folder)
    if not complete:
        return None
    return complete[-1], json.loads((complete[-1] / STATE).read_text())


def needs_universal(state: dict[str, Any]) -> bool:
    """Whether DeepSpeed can read this checkpoint only after conversion: other ranks, ZeRO 1-3."""
    return state["zero_stage"] > 0 and state["world_size"] != distributed.world_size()


def load_checkpoint(engine: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """Restore weights and optimiser. All ranks call it."""
    tag = checkpoint.name
    if needs_universal(state):
        tag = f"{tag}_universal"
        if distributed.is_main():
            _convert(checkpoint, checkpoint.parent / tag)
        distributed.barrier()
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=tag)
    if loaded is None:
        raise UsageError(f"DeepSpeed could not load {checkpoint}")
    distributed.barrier()
    if tag != checkpoint.name and distributed.is_main():
        shutil.rmtree(checkpoint.parent / tag)


def begin_or_resume(
    module: nn.Module,
    optim: OptimConfig,
    config: dict[str, Any],
    checkpoint: tuple[Path, dict[str, Any]] | None,
) -> tuple[Any, int]:
    """DeepSpeed's engine around `module`, and the step it goes on from: the checkpoint's, or 0.

    config: as `deepspeed_config` makes it. All ranks call it.
    """
    if checkpoint is None:
        return build_engine(module, optim, config), 0
    if needs_universal(checkpoint[1]):
        config = {**config, "checkpoint": {"load_universal": True}}
    engine = build_engine(module, optim, config)
    load_checkpoint(engine, *checkpoint)
    return engine, int(checkpoint[1]["step"])


def _convert(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(source), "--output_folder", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed on {source}:\n{done.stderr[-2000:]}")
