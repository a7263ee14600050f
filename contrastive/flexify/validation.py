"""How close a student is to its teacher, patch size by patch size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.flexify.config import FlexifyConfig
from contrastive.flexify.losses import Normaliser, class_head, kl_loss
from contrastive.flexify.student import Teacher
from contrastive.flexify.windows import resize_images
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.pipeline.labelled import LabelledPipeline
from data.progress import Progress
from data.transform import ImageTransform

IMAGES_PER_FORWARD = 32  # of one rank


@dataclass(frozen=True)
class Table:
    """The entry `validation` of the saved tower's config.json."""

    held_out: bool  # whether the images were none of the training's
    samples: int
    teacher: str
    teacher_patch_size: int
    patch_sizes: dict[int, dict[str, float]]
    """Means: `cosine` of standardised features, and where both have class heads `kl` and
    `agreement` of the first choice; `top1` where the labels were read."""

    @property
    def images(self) -> str:
        """What was looked at, and at which patch size the teacher did, in words."""
        which = "held-out" if self.held_out else "training"
        return f"{self.samples:,} {which} images, the teacher at patch {self.teacher_patch_size}"

    def as_json(self) -> dict:
        return asdict(self)

    def figures(self) -> dict[str, float]:
        return {
            f"val/p{size}/{name}": value
            for size, row in self.patch_sizes.items()
            for name, value in row.items()
        }


class Validation:
    """`validation(tower, patch_sizes)`: the table, of the same images for any number of ranks."""

    def __init__(
        self,
        cfg: FlexifyConfig,
        teacher: Teacher,
        transform: ImageTransform,
        normaliser: Normaliser | None,
    ) -> None:
        """transform: the student's; images come as large as the larger of the two towers'."""
        self._cfg, self._teacher, self._normaliser = cfg, teacher, normaliser
        self._normalise = transform.normalise
        shards = cfg.val_shards or cfg.data.shards
        self._batch = IMAGES_PER_FORWARD * distributed.world_size()
        self._pipeline = LabelledPipeline(
            replace(
                cfg.data, shards=shards, weights=(), features="", views=1, crop=1.0, flip=False
            ),
            replace(transform, image_size=max(transform.image_size, teacher.tower.image_size)),
            labels=cfg.loss.labels > 0,
            seed=cfg.seed,
            global_batch_size=self._batch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    @torch.no_grad()
    def __call__(self, tower: VisionTower, patch_sizes: Sequence[int]) -> Table:
        """tower: a locked one. All ranks call it."""
        limit = min(self._cfg.val_samples, self._pipeline.num_samples or self._cfg.val_samples)
        names = self._names(tower)
        sums = torch.zeros(len(patch_sizes), len(names), dtype=torch.float64)
        sums = sums.to(distributed.device())
        counts = torch.zeros(2, dtype=torch.float64, device=sums.device)  # all, and with a label
        rounds = -(-limit // self._batch)
        bar = Progress(
            self._pipeline.batches(0, rounds), "validation", rounds, unit="batch", leave=False,
            disable=not distributed.is_main(),
        )  # fmt: skip
        for batch in bar:
            assert batch.images is not None
            first = batch.step * self._batch + distributed.rank() * IMAGES_PER_FORWARD
            positions = first + torch.arange(len(batch.valid))
            good = batch.valid & (positions < limit)
            images = self._normalise(batch.images[good].to(sums.device))
            labels = None if batch.labels is None else batch.labels[good].to(sums.device)
            if not len(images):
                continue
            labelled = None if labels is None else labels >= 0
            counts += counts.new_tensor(
                [len(images), 0 if labelled is None else int(labelled.sum())]
            )
            taught = self._teacher(images, tower)
            own = resize_images(images, (tower.image_size, tower.image_size))
            for row, size in enumerate(patch_sizes):
                figures = self._compare(tower, tower(own, size), taught, labels, labelled)
                sums[row] += torch.stack([figures[name].double() for name in names])
        sums, counts = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(counts)
        if not counts[0]:
            raise UsageError("not one image of the validation table could be read")
        divisors = [max(1.0, float(counts[1 if name == "top1" else 0])) for name in names]
        means = (sums.cpu() / torch.tensor(divisors, dtype=torch.float64)).tolist()
        return Table(
            held_out=bool(self._cfg.val_shards),
            samples=int(counts[0]),
            teacher=self._cfg.teacher.tower,
            teacher_patch_size=self._teacher.patch_size,
            patch_sizes={
                size: dict(zip(names, row, strict=True))
                for size, row in sorted(zip(patch_sizes, means, strict=True), reverse=True)
            },
        )

    def _names(self, tower: VisionTower) -> list[str]:
        theirs, ours = self._teacher.head, class_head(tower)
        names = ["cosine"] if tower.embed_dim == self._teacher.tower.embed_dim else []
        if theirs is not None and ours is not None and theirs.out_features == ours.out_features:
            names += ["kl", "agreement"]
        return names + (["top1"] if self._cfg.loss.labels else [])

    def _compare(
        self,
        tower: VisionTower,
        features: Float[Tensor, "b d"],
        taught: Float[Tensor, "b e"],
        labels: Int[Tensor, " b"] | None,
        labelled: Bool[Tensor, " b"] | None,
    ) -> dict[str, Tensor]:
        """Sums over the images."""
        out: dict[str, Tensor] = {}
        names = self._names(tower)
        if "cosine" in names:
            ours, theirs = (
                self._normaliser(x) if self._normaliser else x for x in (features, taught)
            )
            out["cosine"] = torch.cosine_similarity(ours, theirs).sum()
        head = class_head(tower)
        logits = head(features) if head is not None else None
        if "kl" in names and logits is not None:
            theirs = self._teacher.logits(taught)
            out["kl"] = kl_loss(logits, theirs, 1.0).sum()
            out["agreement"] = (logits.argmax(-1) == theirs.argmax(-1)).sum()
        if labels is not None and labelled is not None and logits is not None:
            out["top1"] = ((logits.argmax(-1) == labels) & labelled).sum()
        return out
