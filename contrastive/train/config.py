"""The configuration of a text tower's training."""

from dataclasses import dataclass, field

from contrastive.model.config import LossConfig
from contrastive.run.config import RunConfig
from contrastive.text.config import TextConfig
from contrastive.vision.config import VisionConfig
from data.config import DataConfig, Fit, check_data
from data.errors import UsageError


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training run of a text tower against a locked image tower."""

    data: DataConfig = field(default_factory=DataConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    init_samples: int = 4096
    """Training samples for the closed-form whitening and first text projection.
    With 0, no whitening and a random projection."""
    embed_dim: int = 0
    """Width of the embeddings; the whitening reduces wider features to it.
    0: that of the features, or of one token where several are joined."""
    eval_data: tuple[str, ...] = ()
    """Data sets of launch/zeroshot.py to evaluate on: NAME:ROOT, or a folder of shards."""
    eval_patch_sizes: tuple[int, ...] = ()
    """Patch sizes of these evaluations. Empty: the coarsest that is trained."""
    compile: bool = False
    """torch.compile both towers, at zero.stage 3 the image tower alone: up to a minute at the
    start, so for long runs on GPUs, where packed texts are compiled anyway. CPUs gain little
    (benchmarks/compile.py)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_data(self.data)
        check_fit(self.vision.fit, self.data)
        if self.init_samples < 0:
            raise UsageError(f"init_samples {self.init_samples}: at least 0")
        if self.embed_dim < 0:
            raise UsageError(f"embed_dim {self.embed_dim}: at least 0")
        if self.embed_dim and not self.init_samples:
            raise UsageError("embed_dim needs the whitening, so init_samples above 0")


def check_fit(fit: Fit | None, data: DataConfig) -> None:
    """Raise `UsageError` for pictures of many shapes without a cache of their features."""
    if fit == "aspect" and not data.features:
        raise UsageError(
            "fit aspect trains from cached features: name their folder by data.features, or let "
            "vision.fit be crop or squash"
        )
