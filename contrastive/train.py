"""Train a text tower against a locked image tower (LiT), with DeepSpeed ZeRO."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive import distributed
from contrastive.checkpoint import (
    load_checkpoint,
    needs_universal,
    newest_checkpoint,
    save_checkpoint,
)
from contrastive.chunk import find_text_chunk
from contrastive.config import TrainConfig, VisionConfig, save_config
from contrastive.features import FeatureSource, fill_texts
from contrastive.lit import LitModel, TextSide
from contrastive.optim import learning_rate
from contrastive.runlog import RunLog
from contrastive.start import START_FILE, solve_start
from contrastive.step import TrainStep
from contrastive.text import TextEncoder, load_text_tower
from contrastive.vision import load_vision_tower
from contrastive.zero import batch_shape, build_engine, deepspeed_config
from data.errors import UsageError
from data.pipeline import TrainPipeline
from data.shards import expand_shards

Callback = Callable[[int, LitModel], dict[str, float]]
"""(step, model) -> figures for metrics.jsonl and TensorBoard. Called on all ranks."""


def train(cfg: TrainConfig, callbacks: Sequence[Callback] = (), *, resume: bool = False) -> Path:
    """Train from start to end, or on from the newest checkpoint; returns the run folder.

    Raises `UsageError`, before any model is built, when the configuration cannot work.
    """
    distributed.ensure_group()
    world_size = distributed.world_size()
    shape = batch_shape(cfg.global_batch_size, cfg.zero.text_chunk, world_size)
    deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    expand_shards(cfg.data.shards, cfg.data.allow_pipe)
    checkpoint = _find_checkpoint(cfg, resume)

    tower = load_vision_tower(cfg.vision.tower, dtype=distributed.resolve_dtype(cfg.vision.dtype))
    patch_sizes = cfg.vision.patch_sizes or tower.patch_sizes
    for patch_size in patch_sizes:
        tower.check_patch_size(patch_size)
    torch.manual_seed(cfg.seed)  # the projection starts equal on all ranks
    encoder = TextEncoder(load_text_tower(cfg.text), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, cfg.loss)).to(distributed.device())
    model.text.train()
    if cfg.compile:
        tower.compile_blocks()
        encoder.tower.net.compile(dynamic=True)
    pipeline = TrainPipeline(
        cfg.data,
        None if cfg.data.features else tower.transform,
        tokenizer=encoder.tower.tokenizer,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        rank=distributed.rank(),
        world_size=world_size,
    )
    identity = {
        "zero_stage": cfg.zero.stage,
        "image_tower": tower.fingerprint,
        "data": pipeline.fingerprint(),
    }
    _claim_folder(cfg, checkpoint, identity)
    source = FeatureSource(tower, cfg.data, patch_sizes)
    if cfg.data.features:
        fill_texts(cfg.data, encoder.tower.tokenizer)
    skipped = pipeline.problems | ({"bad_image": source.bad_images} if source.bad_images else {})
    if cfg.start_samples:
        solve_start(cfg, model, pipeline, source, patch_sizes)
    if not cfg.zero.text_chunk:
        dtype = distributed.resolve_dtype(cfg.zero.precision)
        chunk = find_text_chunk(model.text, cfg.global_batch_size, dtype)
        shape = batch_shape(cfg.global_batch_size, chunk, world_size)
    ds_config = deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    if checkpoint and needs_universal(checkpoint[1]):
        ds_config["checkpoint"] = {"load_universal": True}
    engine = build_engine(model.text, cfg.optim, ds_config)
    step = 0
    if checkpoint:
        load_checkpoint(engine, *checkpoint)
        step = int(checkpoint[1]["step"])

    train_step = TrainStep(model, engine, shape, cfg.seed)
    log = RunLog(cfg.folder, step, cfg.steps, cfg.log_every, skipped)
    draw = partial(draw_patch_size, cfg.vision, patch_sizes, cfg.seed)
    for batch, features, valid in source.ahead(pipeline.batches(step, cfg.steps - step), draw):
        lr = learning_rate(cfg.optim, step, cfg.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss = train_step(batch, features, valid)
        step += 1
        if log.step(step, loss, int(valid.sum()), batch.errors):
            log.line(step, lr=lr, patch_size=draw(batch.step))
        if callbacks and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
            with log.paused():
                for callback in callbacks:
                    log.write(step, callback(step, model))
        if step == cfg.steps or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
            with log.paused():
                _save_model(cfg, model)
                save_checkpoint(
                    engine, cfg.folder / "checkpoints", step, cfg.keep_checkpoints, identity
                )
    log.close()
    return cfg.folder


def draw_patch_size(cfg: VisionConfig, patch_sizes: Sequence[int], seed: int, step: int) -> int:
    """The patch size of a step: the same on all ranks, a pure function of (seed, step)."""
    weights = np.asarray(cfg.patch_weights or [1.0] * len(patch_sizes), dtype=float)
    position = np.random.PCG64([seed, step, 0x9A7C4]).random_raw() / 2.0**64
    return int(patch_sizes[int((weights.cumsum() / weights.sum() <= position).sum())])


# ---- paragraphs of train() -------------------------------------------------------------------


def _find_checkpoint(cfg: TrainConfig, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    checkpoint = newest_checkpoint(cfg.folder / "checkpoints")
    if resume and checkpoint is None:
        raise UsageError(f"{cfg.folder} has no complete checkpoint to resume from")
    if not resume and checkpoint:
        raise UsageError(
            f"{cfg.folder} holds a run of {checkpoint[1]['step']} steps; give another --name, "
            f"or --resume {cfg.folder}"
        )
    return checkpoint


def _claim_folder(
    cfg: TrainConfig, checkpoint: tuple[Path, dict[str, Any]] | None, identity: dict[str, Any]
) -> None:
    """Make the run folder, or check that what is in it was made of the same towers and data."""
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
            for name in (START_FILE, "metrics.jsonl"):
                (cfg.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "tensorboard"):
                shutil.rmtree(cfg.folder / name, ignore_errors=True)
        save_config(cfg, cfg.folder)
    distributed.barrier()


@contextmanager
def whole_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Within this context every rank holds whole parameters, also under ZeRO-3."""
    import deepspeed

    sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def _save_model(cfg: TrainConfig, model: LitModel) -> None:
    """The portable `model/` folder, replaced as a whole."""
    with whole_parameters(model.text):
        if distributed.is_main():
            model.save_pretrained(cfg.folder / "model")
    distributed.barrier()
