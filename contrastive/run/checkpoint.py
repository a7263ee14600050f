"""Checkpoints in DeepSpeed's format, resumed by the same or another number of ranks.

`checkpoints/step_00000100/` is DeepSpeed's folder (its files are pickles: load only your own runs);
`state.json` beside them is written last, so a folder without it was interrupted and is ignored. It
holds the sizes of the others, which with the checksums in torch's files tell damage.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive import distributed
from contrastive.run.config import OptimConfig
from contrastive.run.log import DIVERGED
from contrastive.run.zero import build_engine
from data.errors import DataError, UsageError
from data.files import check_seal, sealed, write_text_atomically

STATE = "state.json"


def check_finite(step: int, module: nn.Module) -> None:
    """Raise `DataError` where a parameter is not finite: such a model is not saved."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(f"step {step}: {name} is not finite; {DIVERGED}")


def save_checkpoint(engine: Any, folder: Path, step: int, keep: int, extra: dict[str, Any]) -> None:
    """Save after `step` optimiser steps and drop all but the newest `keep`. All ranks call it.

    Raises `DataError` where the disk does not take it.
    """
    tag = f"step_{step:08d}"
    if distributed.is_main():
        # What a kill in mid-save left, of any number of ranks, and what a resume from an older one
        # does again.
        for left in folder.glob("step_*"):
            if left.name == tag or not (left / STATE).exists():
                _remove(left)
    distributed.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # torch's writer of archives has no error of its own
        shutil.rmtree(folder / tag, ignore_errors=True)
        newest = [checkpoint.name for checkpoint in complete_checkpoints(folder)][-1:]
        raise DataError(
            f"the checkpoint of step {step} cannot be written to {folder} (is the disk full?); "
            f"{f'{newest[0]} stays: make room and resume from it' if newest else 'none is there'}"
        ) from error
    distributed.barrier()
    if distributed.is_main():
        files = {f.name: f.stat().st_size for f in (folder / tag).iterdir() if f.is_file()}
        state = {"format": 1, "step": step, "world_size": distributed.world_size(), **extra}
        text = json.dumps(sealed({**state, "files": files})) + "\n"
        write_text_atomically(folder / tag / STATE, text)
        complete = complete_checkpoints(folder)
        for later in [c for c in complete if c.name > tag]:  # damaged: the run began before them
            _remove(later)
        for old in [c for c in complete if c.name <= tag][:-keep]:
            _remove(old)
    distributed.barrier()


def _remove(checkpoint: Path) -> None:
    (checkpoint / STATE).unlink(missing_ok=True)  # first: what a kill leaves counts as interrupted
    shutil.rmtree(checkpoint)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those that were written to their end, oldest first; damaged ones among them."""
    return sorted(state.parent for state in folder.glob(f"step_*/{STATE}"))


def newest_checkpoint(
    folder: Path, told: Callable[[str], object] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint that is not damaged and its state, or None.

    told: gets a sentence for each damaged one that is passed over. Reads the checkpoint whole.
    """
    for checkpoint in reversed(complete_checkpoints(folder)):
        try:
            state = json.loads((checkpoint / STATE).read_text())
            check_seal(checkpoint / STATE, state)
            damage = _damage(checkpoint, state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damage = f"{STATE}: {error}"
        if not damage:
            return checkpoint, state
        if told:
            told(f"checkpoint {checkpoint} is damaged: {damage}")
    return None


def _damage(checkpoint: Path, state: dict[str, Any]) -> str:
    """What is wrong with its files; "" where nothing is. 0.1.0 did not note their sizes."""
    ranks = int(state["world_size"])
    sizes = dict(state.get("files", {}))
    models, moments = "*_model_states.pt", "*_optim_states.pt"
    wanted = {models: ranks if state["zero_stage"] == 3 else 1}
    wanted[moments] = ranks if state["zero_stage"] else 0
    for pattern, number in wanted.items():
        found = len(list(checkpoint.glob(pattern)))
        if not sizes and found < number:
            return f"{found} of {number} files {pattern}"
    for name in sizes or sorted(file.name for file in checkpoint.glob("*.pt")):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != sizes.get(name, size) or not size:
            return f"{name} has {size} bytes" + (f" of {sizes[name]}" if sizes else "")
        if file.suffix == ".pt":  # torch writes zip archives, with a checksum of each entry
            try:
                bad = zipfile.ZipFile(file).testzip()
            except zipfile.BadZipFile as error:
                return f"{name}: {error}"
            if bad:
                return f"{name}: wrong checksum of {bad}"
    return ""


def needs_universal(state: dict[str, Any]) -> bool:
    """Whether DeepSpeed can read this checkpoint only after conversion: other ranks, ZeRO 1-3."""
    return state["zero_stage"] > 0 and state["world_size"] != distributed.world_size()


def load_checkpoint(engine: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """Restore weights and optimiser. All ranks call it."""
    tag = checkpoint.name
    if needs_universal(state):
        _check_shared(engine, state["world_size"])
        tag = f"{tag}_universal"
        if distributed.is_main():
            _convert(checkpoint, checkpoint.parent / tag)
        distributed.barrier()
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=tag)
    if loaded is None:
        raise UsageError(f"DeepSpeed could not load {checkpoint}")
    own_step_counts(getattr(engine.optimizer, "optimizer", engine.optimizer))
    distributed.barrier()
    if tag != checkpoint.name and distributed.is_main():
        shutil.rmtree(checkpoint.parent / tag)


def own_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a count of steps of its own, on its device: a converted checkpoint leaves
    it on the CPU, where a GPU's fused AdamW cannot read it, at ZeRO 3 one for all groups, each of
    which would count on."""
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)


def _check_shared(engine: Any, world_size: int) -> None:
    """Raise `UsageError` on all ranks where one of them has no part of a group of parameters: at
    ZeRO 1 and 2 DeepSpeed fails there. So it is where the logit scale alone has no weight decay."""
    groups = getattr(engine.optimizer, "bit16_groups", ())
    bare = any(all(p._hp_mapping is None for p in group) for group in groups)
    if distributed.all_gather(torch.tensor([int(bare)], device=distributed.device())).any():
        raise UsageError(
            f"ZeRO 1 and 2 cannot share the few parameters that this run trains without weight "
            f"decay among {distributed.world_size()} ranks: resume it with {world_size}"
        )


def begin_or_resume(
    module: nn.Module,
    optim: OptimConfig,
    config: dict[str, Any],
    checkpoint: tuple[Path, dict[str, Any]] | None,
    decay_to_start: float = 0.0,
) -> tuple[Any, int]:
    """DeepSpeed's engine around `module`, and the step it goes on from: the checkpoint's, or 0.

    config: as `deepspeed_config` makes it. All ranks call it.
    """
    if checkpoint is None:
        return build_engine(module, optim, config, decay_to_start), 0
    if needs_universal(checkpoint[1]):
        config = {**config, "checkpoint": {"load_universal": True}}
    engine = build_engine(module, optim, config, decay_to_start)
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
