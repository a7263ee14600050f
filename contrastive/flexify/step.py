"""One optimiser step of a student: the teacher's targets for a batch, and the update.

Everything random (mixing, the window, kept patches) is drawn for the global batch from (seed,
step), so the number of ranks and micro-batches changes nothing.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contrastive import distributed
from contrastive.files.weights import read_sealed_tensors, sealed_tensors
from contrastive.flexify.augment import draw_mixup, mix_pairs, swap_pairs
from contrastive.flexify.config import FlexifyConfig
from contrastive.flexify.losses import Normaliser, Targets, class_shares
from contrastive.flexify.student import Teacher
from contrastive.flexify.windows import cut_for, draw_window, resize_images
from contrastive.image_features import FeatureSource
from contrastive.run.zero import BatchShape
from contrastive.vision.patch_dropout import draw_kept
from contrastive.vision.tower import VisionTower
from data.batch import Batch, Cut
from data.errors import DataError, UsageError
from data.files import write_atomically
from data.pipeline.labelled import LabelledPipeline
from data.progress import Progress

NORMALISER_FILE = "standard.safetensors"


class TeacherSource:
    """The teacher's features of a batch: from the cache if there is one, else live."""

    def __init__(self, cfg: FlexifyConfig, teacher: Teacher, student: VisionTower) -> None:
        self.teacher, self.student = teacher, student
        self._cache: FeatureSource | None = None
        if cfg.data.features:
            self._cache = FeatureSource(teacher.tower, cfg.data, [teacher.patch_size])

    def cached(self, batch: Batch) -> tuple[Float[Tensor, "b d"] | None, Bool[Tensor, " b"]]:
        """Cached features, which need no pixels, and which slots are good."""
        if self._cache is None:
            return None, batch.valid
        features, valid = self._cache(batch, self.teacher.patch_size)
        return features.to(distributed.device()), valid

    def live(self, images: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m d"]:
        return self.teacher(images, self.student)


class DistillationStep:
    """`step(batch, patch_size, keep)`: forward, backward, update; gives this rank's loss share."""

    def __init__(
        self, cfg: FlexifyConfig, engine: Any, source: TeacherSource, shape: BatchShape
    ) -> None:
        self.cfg, self.engine, self.source, self.shape = cfg, engine, source, shape
        self._first = distributed.rank() * shape.per_rank  # of this rank's rows
        self._taught = cfg.loss.features > 0 or cfg.loss.kl > 0

    def __call__(self, batch: Batch, patch_size: int, keep: float) -> Float[Tensor, ""]:
        assert batch.images is not None
        device, student = distributed.device(), self.source.student
        features, valid = self.source.cached(batch)
        images = student.transform.normalise(batch.images.to(device, non_blocking=True))
        valid = valid.to(device)
        classes, labelled = self._classes(batch, valid)
        if self.cfg.augment.mixup:
            own = self._own_share(batch.step, valid)
            images = mix_pairs(images, own)
            if classes is not None:
                classes = mix_pairs(classes, own)
                labelled = labelled & (swap_pairs(labelled) | (own == 1))
        weight, class_weight = self._weights(batch.step, valid, labelled)
        cfg = self.cfg
        images = draw_window(cfg.student.max_aspect, images.shape[-1], cfg.seed, batch.step)(images)
        height, width = images.shape[-2:]
        cut = cut_for(student, patch_size, (height, width), any_patch=True)
        kept = self._kept(batch.step, cut, keep)
        total = torch.zeros((), device=device)
        for start in range(0, self.shape.per_rank, self.shape.micro_batch_size):
            rows = slice(start, start + self.shape.micro_batch_size)
            given = None if features is None else features[rows]
            targets = Targets(
                weight[rows],
                *self._taught_targets(images[rows], given),
                None if classes is None else classes[rows],
                class_weight[rows],
            )
            pixels = resize_images(images[rows], (cut.height, cut.width))
            share = self.engine(
                pixels, cut.patch_size, kept if isinstance(kept, float) else kept[rows], targets
            )
            # The engine averages over micro-batches and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.micro_batches * distributed.world_size()))
            self.engine.step()
            total += share.detach()
        return total

    def _taught_targets(
        self, images: Float[Tensor, "m 3 h w"], features: Float[Tensor, "m d"] | None
    ) -> tuple[Float[Tensor, "m d"] | None, Float[Tensor, "m c"] | None]:
        """The teacher's features, standardised, and its logits, each where a loss needs it."""
        if not self._taught:
            return None, None
        features = self.source.live(images) if features is None else features
        normaliser = self.engine.module.normaliser
        return (
            normaliser(features) if self.cfg.loss.features else None,
            self.source.teacher.logits(features) if self.cfg.loss.kl else None,
        )

    def _classes(
        self, batch: Batch, valid: Bool[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c"] | None, Bool[Tensor, " b"]]:
        """Shares of the classes, and which rows have a label."""
        if batch.labels is None:
            return None, torch.zeros_like(valid)
        num_classes = self.source.student.net.num_classes
        highest = int(batch.labels.max())
        if highest >= num_classes:  # of a stream: local shards were checked before
            raise DataError(f"a label is {highest}, but the student has {num_classes} classes")
        labels = batch.labels.to(valid.device)
        return class_shares(labels, num_classes), valid & (labels >= 0)

    def _own_share(self, step: int, valid: Bool[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Of mixed images; 1 where either of the pair is bad."""
        cfg = self.cfg
        drawn = draw_mixup(cfg.augment.mixup, cfg.global_batch_size, cfg.seed, step)
        own = drawn[self._first : self._first + len(valid)].to(valid.device)
        return torch.where(valid & swap_pairs(valid), own, 1.0)

    def _weights(
        self, step: int, valid: Bool[Tensor, " b"], labelled: Bool[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """1/n for each of the n good (and labelled) rows of the global batch."""
        counts = distributed.all_reduce_sum(torch.stack([valid.sum(), labelled.sum()]))
        if not counts[0]:
            raise DataError(f"step {step}: not one sample of the batch could be read")
        shares = torch.stack([valid, labelled]) / counts.clamp_min(1)[:, None]
        return shares[0], shares[1]

    def _kept(self, step: int, cut: Cut, keep: float) -> float | Tensor:
        if keep == 1:
            return 1.0
        num_patches = (cut.height // cut.patch_size) * (cut.width // cut.patch_size)
        cfg = self.cfg
        kept = draw_kept(keep, num_patches, cfg.global_batch_size, cfg.seed, step)
        return kept[self._first : self._first + self.shape.per_rank].to(distributed.device())


@torch.no_grad()
def fit_normaliser(
    cfg: FlexifyConfig, pipeline: LabelledPipeline, source: TeacherSource
) -> Normaliser:
    """The mean and deviation of the teacher's features of the first training samples.

    Solved once per run, by all ranks together, and kept in the run's folder.
    """
    file = cfg.folder / NORMALISER_FILE
    if not file.exists():
        sums = torch.zeros(3, source.teacher.tower.embed_dim, dtype=torch.float64)
        samples = min(
            cfg.loss.normaliser_samples, pipeline.num_samples or cfg.loss.normaliser_samples
        )
        steps = -(-samples // cfg.global_batch_size)
        bar = Progress(
            pipeline.batches(0, steps), "teacher's mean and deviation", steps, unit="batch",
            disable=not distributed.is_main(),
        )  # fmt: skip
        for batch in bar:
            features, valid = source.cached(batch)
            if features is None and batch.images is not None:
                parts = batch.images.split(cfg.zero.micro_batch_size or 256)
                pixels = (
                    source.student.transform.normalise(p.to(distributed.device())) for p in parts
                )
                features = torch.cat([source.live(part) for part in pixels])
            assert features is not None
            x = features[valid.to(features.device)].double().cpu()
            sums += torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        count, total, squares = distributed.all_reduce_sum(sums.to(distributed.device())).cpu()
        if count[0] < 2:
            raise UsageError(f"of the first {samples} samples fewer than two could be read")
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
        if distributed.is_main():
            moments = {"mean": mean.float(), "std": deviation.float()}
            write_atomically(file, lambda out: out.write(sealed_tensors(moments)))
        distributed.barrier()
    solved, _ = read_sealed_tensors(file)
    return Normaliser(*(solved[name].to(distributed.device()) for name in ("mean", "std")))
