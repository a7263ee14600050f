"""What a student is trained on: its teacher's features and logits, and labels.

Every loss is a sum over images weighted by `Targets.weight`, so shares of micro-batches and ranks
add up to the mean over the global batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.flexify.config import Distance, DistillationConfig
from contrastive.vision.feature_terms import OWN
from contrastive.vision.tower import VisionTower


@dataclass(frozen=True)
class Normaliser:
    """The teacher's standardisation: mean and deviation per dimension, over training images."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]

    def __call__(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return (features - self.mean) / self.std


@dataclass(frozen=True)
class Targets:
    """Training targets of m images. Weights are 1/n for each of the n images that count in
    the global batch, and 0 for the others."""

    weight: Float[Tensor, " m"]
    features: Float[Tensor, "m d"] | None = None  # of the teacher, standardised
    logits: Float[Tensor, "m c"] | None = None  # of the teacher
    classes: Float[Tensor, "m c"] | None = None  # shares of the labels; rows sum to 1
    class_weight: Float[Tensor, " m"] | None = None  # as weight, of the images with a label


# ---- losses, one number per image ----------------------------------------------------------


def kl_loss(
    student: Float[Tensor, "m c"], teacher: Float[Tensor, "m c"], temperature: float
) -> Float[Tensor, " m"]:
    """KL(teacher || student) of softened class probabilities, times temperature^2, so that its
    gradient keeps its size (Hinton et al., arXiv:1503.02531, section 2.1)."""
    target = F.log_softmax(teacher / temperature, dim=-1)
    logs = F.log_softmax(student / temperature, dim=-1)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(-1) * temperature**2


def feature_distance(
    student: Float[Tensor, "m d"], teacher: Float[Tensor, "m d"], distance: Distance
) -> Float[Tensor, " m"]:
    """1 - cosine, or the mean square over dimensions."""
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)


def label_loss(
    logits: Float[Tensor, "m c"],
    classes: Float[Tensor, "m c"],
    kind: Literal["softmax", "sigmoid"],
) -> Float[Tensor, " m"]:
    """Cross-entropy with soft labels, or the sum of the classes' binary cross-entropies."""
    if kind == "softmax":
        return -(classes * F.log_softmax(logits, dim=-1)).sum(-1)
    return F.binary_cross_entropy_with_logits(logits, classes, reduction="none").sum(-1)


def class_shares(labels: Int[Tensor, " b"], num_classes: int) -> Float[Tensor, "b c"]:
    """One-hot rows; zeros where the label is -1."""
    return F.one_hot(labels.clamp_min(0), num_classes).float() * (labels >= 0)[:, None]


def class_head(tower: VisionTower) -> nn.Linear | None:
    """The layer from pooled features to class logits, if the tower has one."""
    if tower.config.features != OWN:
        return None
    head = tower.net.get_classifier() if hasattr(tower.net, "get_classifier") else None
    return head if isinstance(head, nn.Linear) else None


# ---- the module that trains ----------------------------------------------------------------


class DistillationLoss(nn.Module):
    """What DeepSpeed's engine wraps: the student's tower and the loss of a micro-batch."""

    def __init__(
        self, tower: VisionTower, cfg: DistillationConfig, normaliser: Normaliser | None
    ) -> None:
        super().__init__()
        self.tower, self.cfg, self.normaliser = tower, cfg, normaliser

    def forward(
        self,
        images: Float[Tensor, "m 3 h w"],
        patch_size: int,
        keep: float | Int[Tensor, "m k"],
        targets: Targets,
    ) -> Float[Tensor, ""]:
        """These images' share of the global batch's loss."""
        cfg = self.cfg
        features = self.tower(images, patch_size, keep)
        loss = features.new_zeros(())
        if targets.features is not None and self.normaliser is not None:
            each = feature_distance(self.normaliser(features), targets.features, cfg.distance)
            loss = loss + cfg.features * (each * targets.weight).sum()
        if targets.logits is None and targets.classes is None:
            return loss
        head = class_head(self.tower)
        assert head is not None
        logits = head(features).float()
        if targets.logits is not None:
            each = kl_loss(logits, targets.logits, cfg.temperature)
            loss = loss + cfg.kl * (each * targets.weight).sum()
        if targets.classes is not None and targets.class_weight is not None:
            each = label_loss(logits, targets.classes, cfg.label_loss)
            loss = loss + cfg.labels * (each * targets.class_weight).sum()
        return loss
