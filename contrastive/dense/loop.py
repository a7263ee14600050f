"""Train a decoder on the patches of a locked image tower, at random patch sizes.

One decoder serves every patch size once training has drawn them all, as FlexiViT's own tower does
(Beyer et al., arXiv:2212.08013, which fine-tunes Segmenter so).
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive import distributed
from contrastive.dense.box_heads import BoxHeads
from contrastive.dense.config import DenseConfig
from contrastive.dense.decoder_folder import (
    ClassTexts,
    TrainedDecoder,
    new_decoder,
    save_decoder,
)
from contrastive.dense.decoder_losses import BoxLoss, MaskLoss
from contrastive.dense.patch_source import PatchSource
from contrastive.dense.targets import BoxTargets, MaskTargets
from contrastive.files.weights import read_config
from contrastive.run.checkpoint import begin_or_resume, check_finite, save_checkpoint
from contrastive.run.folder import claim_folder, find_checkpoint
from contrastive.run.lock import locked
from contrastive.run.log import RunLog
from contrastive.run.optim import set_learning_rate
from contrastive.run.patch_size import draw_patch_size
from contrastive.run.stop import StopSignal, stopped
from contrastive.run.zero import (
    BatchShape,
    batch_shape,
    deepspeed_config,
    enough_memory,
    whole_parameters,
)
from contrastive.vision.earlier import keep_transform
from contrastive.vision.feature_terms import OWN
from contrastive.vision.load import load_vision_tower
from data.dense.dense_dataset import DenseDataset
from data.errors import UsageError
from data.files import replaced_folder
from data.pipeline.order import SampleOrder

Callback = Callable[[int, TrainedDecoder], dict[str, float]]
"""(step, the decoder as it is) -> figures for metrics.jsonl and TensorBoard. On all ranks."""


def train_decoder(
    cfg: DenseConfig,
    dataset: DenseDataset,
    callbacks: Sequence[Callback] = (),
    *,
    texts: ClassTexts | None = None,
    resume: bool = False,
) -> Path:
    """Train from start to end, or on from the newest checkpoint; returns the run folder, whose
    `model/` is what `load_decoder` reads.

    texts: the vectors of the set's class names, for boxes.
    Raises `UsageError`, before training starts, when the configuration cannot work, or another
    program is writing the run; `Stopped` once SIGINT or SIGTERM has ended it with a checkpoint.
    """
    distributed.ensure_group()
    world_size = distributed.world_size()
    shape = batch_shape(cfg.global_batch_size, cfg.zero.micro_batch_size, world_size)
    ds_config = deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    with locked(cfg.folder):
        run = _prepare(cfg, dataset, texts, resume, shape, ds_config)
        return _train(cfg, run, callbacks, shape)


def _train(cfg: DenseConfig, run: "_Run", callbacks: Sequence[Callback], shape: BatchShape) -> Path:
    step = run.first_step
    log = RunLog(cfg.folder, step, cfg.steps, cfg.log_every, {}, unit="pictures")
    with StopSignal() as stop, enough_memory(shape):
        while step < cfg.steps:
            patch_size = draw_patch_size(run.patch_sizes, run.patch_weights, cfg.seed, step)
            lr = set_learning_rate(run.engine.optimizer, cfg.optim, step, cfg.steps)
            loss, errors = run.train_step(step, patch_size)
            step += 1
            if log.step(step, loss, shape.per_rank - sum(errors.values()), errors):
                log.line(step, lr=lr, patch_size=patch_size)
            signal = stop.after_step()
            evaluate, save = callbacks and cfg.eval_due(step), bool(signal) or cfg.save_due(step)
            if evaluate or save:
                with log.paused():
                    trained = run.whole_decoder(step)
                    if save:  # first: an evaluation that fails costs no training
                        run.save(cfg, step, trained)
                    for callback in callbacks if evaluate else ():
                        log.write(step, callback(step, trained))
            if signal and step < cfg.steps:
                log.close()
                raise stopped(signal, step, cfg)
    log.close()
    return cfg.folder


@dataclass(frozen=True)
class _Run:
    """What the loop works with."""

    engine: Any
    """DeepSpeed's, around the loss."""
    exported: TrainedDecoder
    """A copy of the decoder, whole whatever ZeRO does to that one."""
    source: PatchSource
    order: SampleOrder
    shape: BatchShape
    patch_sizes: tuple[int, ...]
    patch_weights: tuple[float, ...]
    first_step: int
    identity: dict[str, Any]
    """Of the checkpoints: what a resume must bring again."""

    def train_step(self, step: int, patch_size: int) -> tuple[Float[Tensor, ""], dict[str, int]]:
        """Forward, backward, update; this rank's share of the loss, and what it could not use."""
        start = (step * distributed.world_size() + distributed.rank()) * self.shape.per_rank
        rows = self.order.slice(start, start + self.shape.per_rank)[:, 2]
        features, targets, errors = self.source(rows, patch_size)
        counted = distributed.all_reduce_sum(self.engine.module.count(targets)).clamp_min(1)
        total = torch.zeros((), device=targets.device)
        size = self.shape.micro_batch_size
        for part, target in zip(features.split(size), targets.split(size), strict=True):
            share = self.engine(part, target) / counted
            # The engine averages over micro-batches and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.micro_batches * distributed.world_size()))
            self.engine.step()
            total += share.detach()
        return total, errors

    def whole_decoder(self, step: int) -> TrainedDecoder:
        """`exported` as the decoder is after the step. Raises `DataError` where a weight is not
        finite. All ranks call it."""
        decoder = self.engine.module.decoder
        with whole_parameters(decoder):
            self.exported.decoder.load_state_dict(decoder.state_dict())
        check_finite(step, self.exported.decoder)
        return self.exported

    def save(self, cfg: DenseConfig, step: int, trained: TrainedDecoder) -> None:
        """`model/` and a checkpoint."""
        if distributed.is_main():
            run = json.loads((cfg.folder / "config.json").read_text())
            facts = {name: run[name] for name in ("command", "revision")}
            with replaced_folder(cfg.folder / "model") as part:
                save_decoder(trained, part, {"steps": step, **facts})
        distributed.barrier()
        folder = cfg.folder / "checkpoints"
        save_checkpoint(self.engine, folder, step, cfg.keep_checkpoints, self.identity)


def _prepare(
    cfg: DenseConfig,
    dataset: DenseDataset,
    texts: ClassTexts | None,
    resume: bool,
    shape: BatchShape,
    ds_config: dict[str, Any],
) -> _Run:
    """Build the decoder, fill the cache, begin or resume. Raises `UsageError`."""
    checkpoint = find_checkpoint(cfg, resume)
    dtype = distributed.resolve_dtype(cfg.vision.dtype)
    tower = load_vision_tower(cfg.vision.tower, dtype=dtype, features=cfg.vision.features)
    if checkpoint:
        keep_transform(tower, checkpoint[1]["image_tower"], cfg.folder)
    patch_sizes = cfg.vision.patch_sizes or tower.patch_sizes
    for size in (*patch_sizes, *cfg.eval_patch_sizes):
        tower.check_patch_size(size)
    if (cfg.decoder.kind == "boxes") != (texts is not None):
        raise UsageError(f"decoder.kind {cfg.decoder.kind}: boxes need texts, the others none")
    if not len(dataset):
        raise UsageError(f"{dataset.name} has no pictures to train on")
    torch.manual_seed(cfg.seed)  # the decoder starts equal on all ranks
    names = tuple(dataset.class_names)
    spec, features = cfg.vision.tower, cfg.vision.features
    space = (texts.embeds.shape[1], texts.fingerprint) if texts else (0, "")
    trained = new_decoder(cfg.decoder, names, tower, spec, features, patch_sizes, *space)
    if texts and isinstance(trained.decoder, BoxHeads) and features == OWN:
        trained.decoder.start_at(*texts.affine)
    tower.to(distributed.device())
    decoder: Any = copy.deepcopy(trained.decoder)
    module = BoxLoss(decoder, torch.from_numpy(texts.embeds)) if texts else MaskLoss(decoder)
    source = PatchSource(tower, dataset, BoxTargets() if texts else MaskTargets())
    source.check_usable()
    if checkpoint and (cfg.folder / "model").is_dir():
        _check_names(cfg.folder / "model", names)
    identity = {
        "zero_stage": cfg.zero.stage,
        "image_tower": tower.fingerprint,
        "data": source.fingerprint,
    }
    if texts:
        identity["texts"] = texts.fingerprint
    claim_folder(cfg, checkpoint, identity)
    if cfg.data.features:
        source.use_cache(cfg.data.features, patch_sizes)
    trained.decoder.requires_grad_(False).eval()
    exported = replace(trained, decoder=trained.decoder.to(distributed.device()))
    module.to(distributed.device())
    engine, step = begin_or_resume(module, cfg.optim, ds_config, checkpoint)
    order = SampleOrder([len(dataset)], cfg.seed)
    # as often as each has patches to learn from
    weights = cfg.vision.patch_weights or tuple((tower.image_size / s) ** 2 for s in patch_sizes)
    return _Run(engine, exported, source, order, shape, patch_sizes, weights, step, identity)


def _check_names(model: Path, names: tuple[str, ...]) -> None:
    """Raise `UsageError` where a run that goes on has other classes than it was begun with, which
    its masks would number anew."""
    saved = tuple(read_config(model, "decoder").get("class_names", ()))
    if saved != names:
        differ = next((pair for pair in zip(saved, names, strict=False) if pair[0] != pair[1]), ())
        what = " is now ".join(differ) or f"there were {len(saved)}, now there are {len(names)}"
        raise UsageError(f"{model.parent} was trained with other classes: {what}; restore them")
