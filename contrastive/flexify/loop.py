"""Make a fixed-patch ViT flexible: train it at random patch sizes, by distillation or with labels.

FlexiViT (Beyer et al., arXiv:2212.08013): one set of weights serves every patch size once training
has drawn them all; the best start is the teacher itself (section 4.2).
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from contrastive import distributed
from contrastive.flexify.augment import build_change
from contrastive.flexify.checks import check_labels, check_losses
from contrastive.flexify.config import FlexifyConfig
from contrastive.flexify.losses import DistillationLoss
from contrastive.flexify.step import (
    NORMALISER_FILE,
    DistillationStep,
    TeacherSource,
    fit_normaliser,
)
from contrastive.flexify.student import Teacher, build_student
from contrastive.flexify.validation import Table, Validation
from contrastive.flexify.whole_model import teachers_model
from contrastive.flexify.windows import loaded_side
from contrastive.model.card import Card, TowerFacts, tower_card
from contrastive.model.lit import LitModel
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
from contrastive.vision.earlier import keep_cached_transform, keep_transform
from contrastive.vision.formats.own_format import save_vision_tower
from contrastive.vision.patch_dropout import keep_rate_at
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.files import replaced_folder
from data.pipeline.labelled import LabelledPipeline
from data.progress import say_once
from data.shards.names import check_told_apart, expand_shards

Callback = Callable[[int, VisionTower], dict[str, float]]
"""(step, a locked copy of the student) -> figures for metrics.jsonl and TensorBoard."""


def flexify(
    cfg: FlexifyConfig, callbacks: Sequence[Callback] = (), *, resume: bool = False
) -> Path:
    """Train from start to end, or on from the newest checkpoint; returns the run folder.

    Its `model/` is a tower that `load_vision_tower` reads, and a model that
    `LitModel.from_pretrained` reads where the teacher is one. Raises `UsageError`, before training
    starts, when the configuration cannot work, or another program is writing the run; `Stopped`
    once SIGINT or SIGTERM has ended it with a checkpoint.
    """
    distributed.ensure_group()
    world_size = distributed.world_size()
    shape = batch_shape(cfg.global_batch_size, cfg.zero.micro_batch_size, world_size)
    if cfg.augment.mixup and shape.per_rank % 2:
        raise UsageError(
            f"augment.mixup needs pairs: global_batch_size {cfg.global_batch_size} gives each "
            f"of {world_size} ranks {shape.per_rank} images; allowed are even numbers"
        )
    ds_config = deepspeed_config(cfg.zero, cfg.optim, shape, world_size, cfg.deepspeed_config)
    shards = expand_shards(cfg.data.shards, cfg.data.allow_pipe)
    if cfg.data.features:
        check_told_apart(shards)
    if cfg.val_shards:
        expand_shards(cfg.val_shards, cfg.data.allow_pipe)
    with locked(cfg.folder):
        return _flexify(cfg, callbacks, resume, shape, ds_config)


def _flexify(
    cfg: FlexifyConfig,
    callbacks: Sequence[Callback],
    resume: bool,
    shape: BatchShape,
    ds_config: dict[str, Any],
) -> Path:
    run = _prepare(cfg, resume, shape, ds_config)
    step = run.first_step
    log = RunLog(cfg.folder, step, cfg.steps, cfg.log_every, run.pipeline.problems, unit="images")
    with StopSignal() as stop, enough_memory(shape):
        for batch in run.pipeline.batches(step, cfg.steps - step):
            weights = cfg.student.patch_weights
            patch_size = draw_patch_size(run.patch_sizes, weights, cfg.seed, step)
            keep = keep_rate_at(cfg.patch_dropout, step, cfg.steps)
            lr = set_learning_rate(run.engine.optimizer, cfg.optim, step, cfg.steps)
            loss = run.train_step(batch, patch_size, keep)
            step += 1
            if log.step(step, loss, int(batch.valid.sum()), batch.errors):
                log.line(step, lr=lr, patch_size=patch_size, keep=keep)
            evaluate, signal = cfg.eval_due(step), stop.after_step()
            save = bool(signal) or cfg.save_due(step)
            if evaluate or save:
                with log.paused():
                    tower = run.whole_tower(step)
                    table = run.validation(tower, run.patch_sizes) if evaluate else None
                    if table:
                        log.write(step, table.figures())
                    for callback in callbacks if evaluate else ():
                        log.write(step, callback(step, tower))
                    if save:
                        run.save(cfg, step, tower, table)
            if signal and step < cfg.steps:
                log.close()
                raise stopped(signal, step, cfg)
    log.close()
    return cfg.folder


@dataclass(frozen=True)
class _Run:
    """What the loop works with."""

    student: DistillationLoss
    engine: Any
    """DeepSpeed's, around the student."""
    exported: VisionTower
    """A locked copy of the student: whole and plain, whatever ZeRO does to that one."""
    patch_sizes: tuple[int, ...]
    pipeline: LabelledPipeline
    train_step: DistillationStep
    validation: Validation
    first_step: int
    identity: dict[str, Any]
    """Of the checkpoints: what a resume must bring again."""
    model: LitModel | None
    """The whole model that the teacher is a part of, with `exported` in its place; None where it is
    none, and on other ranks."""

    def whole_tower(self, step: int) -> VisionTower:
        """`exported` as the student is after the step. Raises `DataError` where a weight is not
        finite. All ranks call it."""
        with whole_parameters(self.student):
            self.exported.load_state_dict(self.student.tower.state_dict())
        check_finite(step, self.exported)
        return self.exported

    def save(self, cfg: FlexifyConfig, step: int, tower: VisionTower, table: Table | None) -> None:
        """`model/` and a checkpoint."""
        if distributed.is_main():
            self._save_model(cfg, step, tower, table)
        distributed.barrier()
        folder = cfg.folder / "checkpoints"
        save_checkpoint(self.engine, folder, step, cfg.keep_checkpoints, self.identity)

    def _save_model(
        self, cfg: FlexifyConfig, step: int, tower: VisionTower, table: Table | None
    ) -> None:
        """The portable `model/` folder with its card, replaced as a whole."""
        run = json.loads((cfg.folder / "config.json").read_text())
        card = Card(
            shards=cfg.data.shards,
            samples=self.pipeline.num_samples or 0,
            steps=step,
            global_batch_size=cfg.global_batch_size,
            command=run["command"],
            revision=run["revision"],
        )
        facts = {"validation": table and table.as_json()}
        if self.model is not None:
            closeness = {
                f"against the teacher/p{size}/{name}": value
                for size, row in (table.patch_sizes if table else {}).items()
                for name, value in row.items()
            }
            card = replace(card, teacher=cfg.teacher.tower, figures=closeness)
            self.model.save_pretrained(cfg.folder / "model", card, facts)
            return
        about = TowerFacts(
            tower=tower.config.name,
            image_size=tower.image_size,
            teacher=cfg.teacher.tower,
            costs=self.costs,
            figures=table.patch_sizes if table else {},
            figures_of=table.images if table else "",
        )
        with replaced_folder(cfg.folder / "model") as part:
            save_vision_tower(tower, part, facts)
            (part / "README.md").write_text(tower_card(about, card), encoding="utf-8")

    @cached_property
    def costs(self) -> dict[int, tuple[int, float]]:
        """Tokens and GFLOPs of an image, by patch size."""
        tower = self.exported
        return {s: (tower.num_tokens(s), tower.gflops(s)) for s in tower.patch_sizes}


def _prepare(
    cfg: FlexifyConfig, resume: bool, shape: BatchShape, ds_config: dict[str, Any]
) -> _Run:
    """Build teacher and student, fill the cache, begin or resume. Raises `UsageError`."""
    checkpoint = find_checkpoint(cfg, resume)
    teacher = Teacher(cfg.teacher)
    model = teachers_model(cfg) if distributed.is_main() else None
    if model is not None and cfg.loss.distance == "cosine":
        say_once(
            "loss.distance cosine leaves open how long features are, which the cosine between an "
            "image and a text sees; mse keeps them near the texts"
        )
    tower = _build_student(cfg, teacher, ds_config)
    if checkpoint:
        keep_transform(teacher.tower, checkpoint[1]["teacher"], cfg.folder)
        keep_transform(tower, checkpoint[1]["student"], cfg.folder)
    elif keep_cached_transform(teacher.tower, cfg.data.features):
        tower.use_transform(1, teacher.tower.config.fit)  # they see the same pixels
    for each in (teacher.tower, tower):
        each.transform.check_square()
    pipeline = _build_pipeline(cfg, teacher, tower)
    check_labels(cfg, tower)
    identity = {
        "zero_stage": cfg.zero.stage,
        "teacher": teacher.tower.fingerprint,
        "student": tower.fingerprint,
        "data": pipeline.fingerprint(),
    }
    claim_folder(cfg, checkpoint, identity, NORMALISER_FILE)
    source = TeacherSource(cfg, teacher, tower)
    normaliser = fit_normaliser(cfg, pipeline, source) if cfg.loss.features else None
    validation = Validation(cfg, teacher, tower.transform, normaliser)
    exported = copy.deepcopy(tower).lock()
    if model is not None:
        model.vision = exported
    student = DistillationLoss(tower, cfg.loss, normaliser)
    engine, step = begin_or_resume(student, cfg.optim, ds_config, checkpoint)
    _register_stem(student.tower, cfg.zero.stage)
    patch_sizes = cfg.student.patch_sizes or tower.patch_sizes
    train_step = DistillationStep(cfg, engine, source, shape)
    return _Run(
        student, engine, exported, patch_sizes, pipeline, train_step, validation, step, identity,
        model,
    )  # fmt: skip


def _build_student(
    cfg: FlexifyConfig, teacher: Teacher, ds_config: Mapping[str, Any]
) -> VisionTower:
    """The student, equal on all ranks and checked against the losses, on this rank's device."""
    torch.manual_seed(cfg.seed)  # new parameters start equal on all ranks
    tower = build_student(cfg.student, cfg.teacher, teacher.patch_size)
    check_losses(cfg, teacher, tower)
    tower.to(distributed.device())
    if distributed.device().type == "cpu" and "torch_autocast" in ds_config:
        for block in tower.net.blocks:  # as text towers do, see HFTextTower
            block.attn.fused_attn = False
    return tower


def _build_pipeline(cfg: FlexifyConfig, teacher: Teacher, tower: VisionTower) -> LabelledPipeline:
    """This rank's batches, of images as large as the larger of the two towers', or as their
    windows need them."""
    size = max(tower.image_size, 0 if cfg.data.features else teacher.tower.image_size)
    size = loaded_side(size, cfg.student.max_aspect)
    return LabelledPipeline(
        cfg.data,
        replace(tower.transform, image_size=size),
        build_change(cfg.augment),
        labels=cfg.loss.labels > 0,
        seed=cfg.seed,
        global_batch_size=cfg.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _register_stem(tower: VisionTower, stage: int) -> None:
    """ZeRO-3 gathers a module's parameters when it is called; the tower reads these without."""
    if stage < 3:
        return
    import deepspeed

    own = tower.net.named_parameters(recurse=False)
    for parameter in [*(p for _, p in own), *tower.net.patch_embed.proj.parameters()]:
        deepspeed.zero.register_external_parameter(tower, parameter)
