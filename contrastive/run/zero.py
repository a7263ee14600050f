"""DeepSpeed: its configuration, its engine, and the only place where batch arithmetic lives."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrastive import distributed
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.optim import DecayToStart, build_optimizer
from data.errors import UsageError, is_gpu_full


@dataclass(frozen=True)
class BatchShape:
    """world_size * micro_batches * micro_batch_size are the texts, or images, of a step."""

    per_rank: int
    micro_batch_size: int
    micro_batches: int


def batch_shape(
    global_batch_size: int, micro_batch_size: int, world_size: int, captions_per_image: int = 1
) -> BatchShape:
    """Split the global batch over ranks and micro-batches; `UsageError` when it does not divide."""
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UsageError(
            f"global_batch_size {global_batch_size} cannot be shared by {world_size} ranks; "
            f"allowed are multiples of {world_size}"
        )
    per_rank = global_batch_size // world_size * captions_per_image
    size = micro_batch_size or per_rank
    if size < 1 or per_rank % size:
        allowed = ", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
        raise UsageError(
            f"zero.micro_batch_size {micro_batch_size} does not divide a rank's {per_rank} texts "
            f"or images; allowed: {allowed}"
        )
    return BatchShape(per_rank, size, per_rank // size)


def deepspeed_config(
    zero: ZeroConfig, optim: OptimConfig, shape: BatchShape, world_size: int, file: str = ""
) -> dict[str, Any]:
    """DeepSpeed's JSON. `file`: a user's own JSON, merged over ours.

    Raises `UsageError` where that file contradicts the batch sizes or brings an optimiser.
    """
    if zero.offload == "cpu" and zero.stage == 0:
        raise UsageError("zero.offload cpu needs zero.stage 1, 2 or 3")
    if optim.name == "adafactor" and zero.stage:  # stages 1 to 3 flatten the matrices it factors
        raise UsageError(f"optim.name adafactor needs zero.stage 0, not {zero.stage}")
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.offload == "cpu":
        stage["offload_optimizer"] = {"device": "cpu"}
        if zero.stage == 3:
            stage["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": shape.per_rank * world_size,
        "train_micro_batch_size_per_gpu": shape.micro_batch_size,
        "gradient_accumulation_steps": shape.micro_batches,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: no compiler needed
        "steps_per_print": 10**9,
        # which waits for the GPU, all its streams, before and after every micro-batch
        "timers": {"throughput": {"enabled": False}},
    }
    if distributed.resolve_dtype(zero.precision) == torch.bfloat16:
        # "bf16" would cast every parameter, and bf16 moves a logit scale near ln(100) in 3% steps.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": ["torch.nn.Linear"],
        }
    return _merge_user_json(config, file) if file else config


def build_engine(
    module: nn.Module, optim: OptimConfig, config: dict[str, Any], decay_to_start: float = 0.0
) -> Any:
    """DeepSpeed's engine around the trainable part of a model."""
    import deepspeed  # slow to import

    deepspeed.utils.logger.setLevel(logging.WARNING)
    optimizer = build_optimizer(optim, module, decay_to_start)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if distributed.world_size() == 1 and config["zero_optimization"]["stage"] == 0:
        # Else all gradients are copied, divided by 1, and copied back: 2% of a step of MiniLM.
        engine.enable_backward_allreduce = False
    if decay_to_start:
        DecayToStart(engine)
    return engine


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; `most` is at least 1."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


@contextmanager
def enough_memory(shape: BatchShape) -> Iterator[None]:
    """Raises `UsageError` with a smaller micro-batch where this rank's GPU runs out of memory.

    The launcher then ends the other ranks, which wait for this one.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_gpu_full(error):
            raise
        size = shape.micro_batch_size
        advice = "a higher zero.stage, or zero.offload cpu,"
        if size > 1:
            advice = f"zero.micro_batch_size={largest_divisor(shape.per_rank, size // 2)}"
        raise UsageError(
            f"the GPU is out of memory with micro-batches of {size}; {advice} takes less; "
            "what was saved is kept, and resume continues from it"
        ) from error


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Within this context every rank holds whole parameters, also under ZeRO-3."""
    import deepspeed

    sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def _merge_user_json(config: dict[str, Any], file: str) -> dict[str, Any]:
    try:
        user = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"deepspeed_config {file} cannot be read as JSON: {error}") from error
    if not isinstance(user, dict):
        raise UsageError(f"deepspeed_config {file} holds no JSON object")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        if user.get(key, "auto") not in ("auto", config[key]):
            raise UsageError(
                f"deepspeed_config {file} says {key} = {user[key]}, but global_batch_size and "
                f"zero.micro_batch_size give {config[key]}; allowed there: {config[key]} or nothing"
            )
        user.pop(key, None)
    ours = {"optimizer": "optim", "scheduler": "optim", "bf16": "zero", "fp16": "zero"}
    for key, flags in ours.items():
        if key in user:
            raise UsageError(
                f"deepspeed_config {file} may not say {key!r}; the {flags} parameters say that"
            )
    stage = config["zero_optimization"]["stage"]
    if user.get("zero_optimization", {}).get("stage", stage) not in ("auto", stage):
        raise UsageError(f"deepspeed_config {file} says another ZeRO stage than zero.stage {stage}")
    return _merged(config, user)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        if value == "auto":  # ours is meant
            continue
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
