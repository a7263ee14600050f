"""The configuration of a training that makes a tower flexible."""

import math
from dataclasses import dataclass, field
from typing import Literal

from contrastive.run.config import RunConfig
from contrastive.vision.config import PatchDropoutConfig
from contrastive.vision.feature_terms import parse_features
from data.config import DataConfig, check_data, check_weights
from data.errors import UsageError

MAX_ASPECT = 8.0
"""A strip of 4 x 32 patches; the coarsest patch sizes leave a grid of 1 x 11."""


@dataclass(frozen=True)
class TeacherConfig:
    """The locked tower whose features and logits are the targets."""

    tower: str = "dinov2s"
    """dinov2s, dinov2s-flexi, a folder, timm:NAME, open_clip:ARCHITECTURE@FILE, ...
    All formats are listed in docs/towers.md."""
    patch_size: int = 0
    """Patch size at which the teacher runs; 0: its own."""
    dtype: Literal["float32", "bfloat16", "fastest"] = "float32"
    """Of its weights; fastest: bfloat16 where the GPU or CPU supports it, else float32."""
    features: str = "own"
    """Which tokens of which blocks are the targets, as in `--vision.features` of launch/lit.py."""

    def __post_init__(self) -> None:
        parse_features(self.features, "teacher.features")


@dataclass(frozen=True)
class StudentConfig:
    """The tower that becomes flexible."""

    tower: str = ""
    """Tower to start from, named like the teacher's. Empty: the teacher itself."""
    image_size: int = 0
    """Side in pixels; 0: the tower's own."""
    patch_sizes: tuple[int, ...] | None = None
    """One is drawn per step, for all ranks. Not given: all that the tower offers; where that is
    its own alone, all that divide the image side to grids of 4 to 30."""
    patch_weights: tuple[float, ...] = ()
    """How often each patch size is drawn, relative to the others. Empty: equally often."""
    max_aspect: float = 1.0
    """Above 1, a step looks at a rectangle of its images, its longer side up to so many times the
    shorter, drawn per step, at as many patches as the patch size gives of a square. 1: squares."""
    kernel_size: int = 0
    """Side of the stored patch kernel, from which all others are resized; 0: unchanged."""
    grid: int = 0
    """Side of the stored position grid; 0: unchanged."""
    pooling: Literal["own", "token", "avg", "map"] = "own"
    """Class token, mean, attention pooling, or (own) whatever the tower has."""
    num_classes: int = 0
    """Classes of a new head; 0: the tower's own head, if it has one."""
    trainable: tuple[str, ...] = ()
    """Regular expressions; parameters whose name contains a match are trained. Empty: all."""

    def __post_init__(self) -> None:
        if self.patch_sizes is not None and not self.patch_sizes:
            raise UsageError("student.patch_sizes is empty; name at least one, or leave it out")
        if self.patch_sizes is not None or self.patch_weights:
            check_weights(
                "student.patch_weights",
                self.patch_weights,
                "student.patch_sizes",
                len(self.patch_sizes or ()),
            )
        for name in ("image_size", "kernel_size", "grid", "num_classes"):
            if getattr(self, name) < 0:
                raise UsageError(f"student.{name} {getattr(self, name)}: at least 0")
        if not 1 <= self.max_aspect <= MAX_ASPECT:
            raise UsageError(f"student.max_aspect {self.max_aspect}: allowed are 1 to {MAX_ASPECT}")


Distance = Literal["cosine", "mse"]


@dataclass(frozen=True)
class DistillationConfig:
    """The loss: a weighted sum of up to three terms."""

    kl: float = 0.0
    """Weight of KL(teacher || student) over class probabilities (arXiv:2212.08013)."""
    temperature: float = 1.0
    """Divides the class logits of both before the KL divergence."""
    features: float = 1.0
    """Weight of the distance between pooled features."""
    distance: Distance = "cosine"
    """Between features standardised by the teacher's mean and deviation."""
    labels: float = 0.0
    """Weight of the loss on KEY.cls labels."""
    label_loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy, or a sigmoid for each class (arXiv:2006.07159)."""
    normaliser_samples: int = 1024
    """Training samples for the teacher's mean and deviation."""

    def __post_init__(self) -> None:
        for name in ("kl", "features", "labels"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"loss.{name} {getattr(self, name)}: must be at least 0")
        if not self.kl + self.features + self.labels:
            raise UsageError("loss.kl, loss.features and loss.labels are all 0: weigh one")
        if not self.temperature > 0:
            raise UsageError(f"loss.temperature {self.temperature}: must be above 0")
        if self.normaliser_samples < 2:
            raise UsageError(f"loss.normaliser_samples {self.normaliser_samples}: at least 2")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images, besides the crops and flips of `data`."""

    randaugment: int = 0
    """Magnitude (1 to 30) of two random operations per image (arXiv:1909.13719); 0: none."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (arXiv:1710.09412); 0: no mixup."""

    def __post_init__(self) -> None:
        if not 0 <= self.randaugment <= 30:
            raise UsageError(f"augment.randaugment {self.randaugment}: allowed are 0 to 30")
        if not self.mixup >= 0:
            raise UsageError(f"augment.mixup {self.mixup}: must be at least 0")


@dataclass(frozen=True)
class FlexifyConfig(RunConfig):
    """One training run of a student that becomes flexible."""

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    patch_dropout: PatchDropoutConfig = field(default_factory=PatchDropoutConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    val_shards: tuple[str, ...] = ()
    """Shards for the validation table. Empty: training images."""
    val_samples: int = 1024
    """Images in the validation table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_data(self.data)
        if self.val_samples < 1:
            raise UsageError(f"val_samples {self.val_samples}: at least 1")
        if self.data.captions_per_image > 1:
            raise UsageError("data.captions_per_image: a tower is made flexible without captions")
        if self.data.features and self.student.max_aspect > 1:
            raise UsageError(
                "data.features keeps what the teacher says of whole images; leave out the cache, "
                "or student.max_aspect"
            )
        if self.data.features and self.augment != AugmentConfig():
            raise UsageError(
                "data.features keeps what the teacher says of unchanged images; leave out "
                "augment.randaugment and augment.mixup, or the cache"
            )
