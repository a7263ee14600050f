"""Train a text tower against a locked image tower (LiT), with DeepSpeed ZeRO."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contrastive import distributed
from contrastive.image_features import FeatureSource
from contrastive.model.card import Card
from contrastive.model.lit import LitModel
from contrastive.model.shaped import check_reads_shapes
from contrastive.model.text_side import TextSide
from contrastive.run.checkpoint import begin_or_resume, check_finite, save_checkpoint
from contrastive.run.folder import claim_folder, find_checkpoint
from contrastive.run.lock import locked
from contrastive.run.log import RunLog
from contrastive.run.optim import set_learning_rate
from contrastive.run.patch_size import draw_patch_size
from contrastive.run.stop import StopSignal, stopped
from contrastive.run.trainable import train_only
from contrastive.run.zero import (
    BatchShape,
    batch_shape,
    deepspeed_config,
    enough_memory,
    whole_parameters,
)
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.lora import add_lora, check_peft, merged
from contrastive.text.tower import TextTower
from contrastive.text_features import fill_text_vectors, fill_texts, open_text_vectors
from contrastive.train.closed_form import INIT_FILE, closed_form_init
from contrastive.train.config import TrainConfig, check_fit
from contrastive.train.micro_batch import compile_texts, find_micro_batch_size
from contrastive.train.step import TrainStep
from contrastive.vision.earlier import keep_cached_transform, keep_transform
from contrastive.vision.load import load_vision_tower
from contrastive.vision.tower import VisionTower
from data.cache.text_vectors import TextVectorCache
from data.errors import UsageError
from data.pipeline.captioned import CaptionedPipeline
from data.shards.names import check_told_apart, expand_shards

Callback = Callable[[int, LitModel], dict[str, float]]
"""(step, model) -> figures for metrics.jsonl and TensorBoard. Called on all ranks."""


def train(cfg: TrainConfig, callbacks: Sequence[Callback] = (), *, resume: bool = False) -> Path:
    """Train from start to end, or on from the newest checkpoint; returns the run folder.

    Raises `UsageError`, before any model is built, when the configuration cannot work, or another
    program is writing the run; `Stopped` once SIGINT or SIGTERM has ended it with a checkpoint.
    """
    distributed.ensure_group()
    world_size = distributed.world_size()
    shape = _shape(cfg, cfg.zero.micro_batch_size)
    deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    shards = expand_shards(cfg.data.shards, cfg.data.allow_pipe)
    if cfg.data.features:
        check_told_apart(shards)
    if cfg.text.lora:
        check_peft()
    with locked(cfg.folder):
        return _train(cfg, callbacks, resume, shape)


def _train(
    cfg: TrainConfig, callbacks: Sequence[Callback], resume: bool, shape: BatchShape
) -> Path:
    run = _prepare(cfg, resume, shape)
    step, bad_images = run.first_step, run.source.bad_images
    skipped = run.pipeline.problems | ({"bad_image": bad_images} if bad_images else {})
    log = RunLog(cfg.folder, step, cfg.steps, cfg.log_every, skipped)
    figures: dict[str, float] = {}  # of the newest evaluation
    steps = run.pipeline.steps(step, cfg.steps - step)
    with StopSignal() as stop, enough_memory(run.train_step.shape):
        for batch, features, valid in run.source.ahead(steps, run.draw):
            lr = set_learning_rate(run.engine.optimizer, cfg.optim, step, cfg.steps)
            loss = run.train_step(batch, features, valid)
            step += 1
            if log.step(step, loss, int(valid.sum()), batch.errors):
                log.line(step, lr=lr, patch_size=run.draw(batch.step), **run.texts)
            if callbacks and cfg.eval_due(step):
                with log.paused():
                    for callback in callbacks:
                        found = callback(step, run.model)
                        log.write(step, found)
                        figures |= found
            signal = stop.after_step()
            if signal or cfg.save_due(step):
                with log.paused():
                    run.save(cfg, step, figures)
            if signal and step < cfg.steps:
                log.close()
                raise stopped(signal, step, cfg)
    log.close()
    return cfg.folder


@dataclass(frozen=True)
class _Run:
    """What the loop works with."""

    model: LitModel
    engine: Any
    """DeepSpeed's, around what trains of the model."""
    pipeline: CaptionedPipeline
    source: FeatureSource
    draw: Callable[[int], int]
    """The patch size of a step, counted from 0."""
    train_step: TrainStep
    first_step: int
    identity: dict[str, Any]
    """Of the checkpoints: what a resume must bring again."""
    texts_compiled: bool

    @property
    def texts(self) -> dict[str, int]:
        """How texts are read, as metrics.jsonl says it."""
        return {
            "texts_packed": int(self.train_step.packed),
            "texts_compiled": int(self.texts_compiled),
        }

    def save(self, cfg: TrainConfig, step: int, figures: dict[str, float]) -> None:
        """`model/` and a checkpoint."""
        _save_model(cfg, self.model, step, self.pipeline.num_samples or 0, figures)
        folder = cfg.folder / "checkpoints"
        save_checkpoint(self.engine, folder, step, cfg.keep_checkpoints, self.identity)


def _prepare(cfg: TrainConfig, resume: bool, shape: BatchShape) -> _Run:
    """Build the model, fill the caches, begin or resume. Raises `UsageError`."""
    checkpoint = find_checkpoint(cfg, resume)
    model = _build_model(cfg, checkpoint and checkpoint[1]["image_tower"])
    patch_sizes = cfg.vision.patch_sizes or model.patch_sizes
    vectors = None
    if cfg.text.frozen and cfg.data.features:
        vectors = open_text_vectors(cfg.data, model.text.encoder.tower)
    pipeline = _build_pipeline(cfg, model, vectors)
    identity = {
        "zero_stage": cfg.zero.stage,
        "image_tower": model.vision.fingerprint,
        "data": pipeline.fingerprint(),
    }
    claim_folder(cfg, checkpoint, identity, INIT_FILE)
    source = FeatureSource(model.vision, cfg.data, patch_sizes)
    if cfg.data.features:
        fill_texts(cfg.data, model.text.encoder.tower.tokenizer)
        if vectors is not None:
            fill_text_vectors(cfg.data, model.text.encoder.tower, vectors)
    if cfg.init_samples:
        closed_form_init(cfg, model, pipeline, source, patch_sizes)
    world_size = distributed.world_size()
    dtype = distributed.resolve_dtype(cfg.zero.precision)
    if not cfg.zero.micro_batch_size:
        captions, cached = cfg.data.captions_per_image, vectors is not None
        texts = find_micro_batch_size(model, cfg.global_batch_size, dtype, captions, cached)
        shape = _shape(cfg, texts)
    ds_config = deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    hold = cfg.text.decay_to_start
    engine, step = begin_or_resume(model.trained, cfg.optim, ds_config, checkpoint, hold)
    compiles = vectors is None and cfg.zero.stage < 3 and not cfg.compile
    texts_compiled = compiles and compile_texts(model, shape.micro_batch_size, dtype)

    def draw(step: int) -> int:
        return draw_patch_size(patch_sizes, cfg.vision.patch_weights, cfg.seed, step)

    train_step = TrainStep(model, engine, shape, cfg.seed, dtype)
    return _Run(model, engine, pipeline, source, draw, train_step, step, identity, texts_compiled)


def _shape(cfg: TrainConfig, micro_batch_size: int) -> BatchShape:
    """How texts are shared; raises `UsageError`."""
    world_size, captions = distributed.world_size(), cfg.data.captions_per_image
    return batch_shape(cfg.global_batch_size, micro_batch_size, world_size, captions)


def _build_model(cfg: TrainConfig, resumed: str | None) -> LitModel:
    """The locked image tower, checked against the patch sizes, and the text side, in train mode.

    resumed: the fingerprint of the tower of the run that is resumed.
    """
    dtype = distributed.resolve_dtype(cfg.vision.dtype)
    tower = load_vision_tower(cfg.vision.tower, dtype=dtype, features=cfg.vision.features)
    if resumed is not None:
        keep_transform(tower, resumed, cfg.folder)
    else:
        keep_cached_transform(tower, cfg.data.features)
    tower.use_transform(fit=cfg.vision.fit)  # what was asked for, whatever is kept
    for patch_size in cfg.vision.patch_sizes or tower.patch_sizes:
        tower.check_patch_size(patch_size)
    check_fit(tower.transform.fit, cfg.data)
    if tower.transform.fit == "aspect":
        check_reads_shapes(tower)
    width = _embed_dim(cfg, tower)
    torch.manual_seed(cfg.seed)  # the projection starts equal on all ranks
    encoder = TextEncoder(_load_text_tower(cfg), width, cfg.text.head)
    model = LitModel(tower, TextSide(encoder, cfg.loss), width, cfg.vision.head)
    if cfg.text.lora:  # last, so that what is random before it is as without
        add_lora(encoder.tower, cfg.text.lora)
    model.to(distributed.device()).text.train()
    if cfg.compile:
        # torch.compile reads .grad of the token embeddings, which warns.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        tower.compile_blocks()
        if cfg.zero.stage < 3:  # which gathers and frees parameters within the network
            encoder.tower.compile_net()
    return model


def _load_text_tower(cfg: TrainConfig) -> TextTower:
    """The text tower, of which only a part may train, or nothing."""
    tower = load_text_tower(cfg.text)
    if cfg.text.frozen:
        return tower.lock()
    if cfg.text.trainable:
        frozen = [p for p in tower.parameters() if not p.requires_grad]  # the embeddings
        train_only(tower, cfg.text.trainable, "text.trainable")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return tower


def _embed_dim(cfg: TrainConfig, tower: VisionTower) -> int:
    """Width of the embeddings. Raises `UsageError` for more than the features have."""
    if cfg.embed_dim > tower.embed_dim:
        raise UsageError(
            f"embed_dim {cfg.embed_dim}: the features of {cfg.vision.tower} have width "
            f"{tower.embed_dim}; allowed: 1 to {tower.embed_dim}"
        )
    joined = cfg.init_samples and len(tower.terms) > 1
    return cfg.embed_dim or (min(tower.width, tower.embed_dim) if joined else tower.embed_dim)


def _build_pipeline(
    cfg: TrainConfig, model: LitModel, vectors: TextVectorCache | None
) -> CaptionedPipeline:
    """This rank's batches; without images where their features are cached."""
    return CaptionedPipeline(
        cfg.data,
        None if cfg.data.features else model.transform,
        tokenizer=model.text.encoder.tower.tokenizer,
        vectors=vectors,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _save_model(
    cfg: TrainConfig, model: LitModel, step: int, samples: int, figures: dict[str, float]
) -> None:
    """The portable `model/` folder with its card, replaced as a whole."""
    with whole_parameters(model.trained):
        check_finite(step, model.trained)
        if distributed.is_main():
            run = json.loads((cfg.folder / "config.json").read_text())
            card = Card(
                shards=cfg.data.shards,
                samples=samples,
                steps=step,
                global_batch_size=cfg.global_batch_size,
                command=run["command"],
                revision=run["revision"],
                figures=figures,
            )
            with merged(model.text.encoder.tower):
                model.save_pretrained(cfg.folder / "model", card)
    distributed.barrier()
