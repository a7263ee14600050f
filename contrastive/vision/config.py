"""Which image tower, at which patch sizes, and how much of an image it reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contrastive.vision.feature_terms import parse_features
from data.config import Fit, check_weights
from data.errors import UsageError

Head = Literal["none", "linear", "mlp"]


@dataclass(frozen=True)
class VisionConfig:
    """The locked image tower and the patch sizes that training draws."""

    tower: str = "dinov2s"
    """dinov2s, dinov2s-flexi, a folder, timm:NAME, open_clip:ARCHITECTURE@FILE, ...
    All formats are listed in docs/towers.md."""
    patch_sizes: tuple[int, ...] = ()
    """One is drawn per step, for all ranks. Empty: all that the tower offers."""
    patch_weights: tuple[float, ...] = ()
    """How often each patch size is drawn, relative to the others. Empty: equally often; decoders
    draw each as often as it has patches to learn from."""
    dtype: Literal["float32", "bfloat16", "fastest"] = "float32"
    """Of the tower's weights; bfloat16 changes features by about 1e-2.
    fastest: bfloat16 where the GPU or CPU supports it, else float32."""
    features: str = "own"
    """Which tokens of which blocks make a feature: own, cls, mean, cls@-2, cls@9+cls@10+mean, ...
    Blocks count from 1, or from the end with a minus; + joins."""
    fit: Fit | None = None
    """crop cuts a square from the middle of an image, squash makes one of the whole, aspect keeps
    its shape, which needs `data.features`. Not given: the tower's own."""
    head: Head = "none"
    """What is trained over the whitened features: nothing, a linear map, or a gated MLP. Either
    starts at what none gives."""

    def __post_init__(self) -> None:
        parse_features(self.features, "vision.features")
        check_weights(
            "vision.patch_weights", self.patch_weights, "vision.patch_sizes", len(self.patch_sizes)
        )


@dataclass(frozen=True)
class PatchDropoutConfig:
    """Which share of the patches a training step reads.

    A random choice for each image: PatchDropout (Liu et al., arXiv:2208.07220). A share that
    changes over training: the patch sampling schedule (McDanel and Huynh, arXiv:2208.09520).
    """

    keep_rate: float = 1.0
    """Share of the patches that is read, at the first step; 1: all."""
    keep_rate_end: float = 1.0
    """Share at the end of a linear schedule, or in the middle of a cycle."""
    schedule: Literal["constant", "linear", "cyclic"] = "constant"
    """linear: keep_rate to keep_rate_end over the run; cyclic: there and back, repeatedly."""
    cycle_steps: int = 100
    """Length of a cycle."""

    def __post_init__(self) -> None:
        for name in ("keep_rate", "keep_rate_end"):
            check_keep_rate(f"patch_dropout.{name}", getattr(self, name))
        if self.cycle_steps < 2:
            raise UsageError(f"patch_dropout.cycle_steps {self.cycle_steps}: at least 2")


def check_keep_rate(name: str, keep_rate: float) -> None:
    """Raise `UsageError` for a rate outside (0, 1]; `name` is what the message calls it."""
    if not 0 < keep_rate <= 1:
        raise UsageError(f"{name} {keep_rate}: allowed are shares above 0, up to 1")


def is_library_spec(text: str) -> bool:
    """Whether this names a whole model of open_clip or transformers, rather than a folder."""
    kind, _, rest = text.partition(":")
    return kind in ("open_clip", "transformers") and bool(rest)


def check_tower_spec(spec: str) -> None:
    """Raise `UsageError` for what `load_vision_tower` does not read, before torch is imported."""
    kind, _, rest = spec.partition(":")
    known = kind in ("timm", "bigvision", "open_clip", "transformers", "vit_pytorch") and rest
    if known or spec in ("dinov2s", "dinov2s-flexi") or (Path(spec) / "config.json").is_file():
        return
    raise UsageError(
        f"unknown image tower {spec!r}; allowed: timm:NAME, timm:NAME@FILE, "
        "timm:local-dir:FOLDER, bigvision:FILE.npz[@SIZE], open_clip:ARCHITECTURE@FILE, "
        "open_clip:local-dir:FOLDER, transformers:FOLDER_OR_HUB_NAME, vit_pytorch:NAME@FILE, "
        "dinov2s, dinov2s-flexi, or a folder with config.json"
    )
