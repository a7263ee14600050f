"""The configuration of a decoder's training."""

from dataclasses import dataclass, field
from typing import Literal

from contrastive.run.config import RunConfig
from contrastive.vision.config import VisionConfig
from data.errors import UsageError

Kind = Literal["linear", "mask_transformer", "mlp", "boxes"]
HEAD_WIDTH = 64  # of attention


@dataclass(frozen=True)
class DecoderConfig:
    """What is trained over the patches' features."""

    kind: Kind = "linear"
    """linear: a linear map of each patch. mask_transformer: Segmenter's (arXiv:2105.05633).
    mlp: SegFormer's (arXiv:2105.15203), a linear map of each block of `vision.features`, then two
    of them joined. boxes: OWL-ViT's heads (arXiv:2205.06230), which find anything that has a name;
    `vision.tower` is a whole model then, whose texts they read."""
    width: int = 256
    """Of the layers within; a linear decoder has none. mask_transformer: a multiple of 64."""

    def __post_init__(self) -> None:
        if self.width < 1 or (self.kind == "mask_transformer" and self.width % HEAD_WIDTH):
            allowed = (
                f"multiples of {HEAD_WIDTH}" if self.kind == "mask_transformer" else "1 or more"
            )
            raise UsageError(f"decoder.width {self.width}: allowed with {self.kind} are {allowed}")


@dataclass(frozen=True)
class PicturesConfig:
    """Pictures with masks, or with boxes, to train on."""

    pictures: str = ""
    """Their folder, in a layout that docs/dense.md lists."""
    split: str = ""
    """As the layout calls it; a folder of images/ and masks/ has none."""
    features: str = ""
    """Folder of cached features of the patches, filled on first use, some 0.2 MB a picture at patch
    14. Empty: the tower runs in each step."""


@dataclass(frozen=True)
class DenseConfig(RunConfig):
    """One training run of a decoder on a locked image tower."""

    data: PicturesConfig = field(default_factory=PicturesConfig)
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(features="mean"))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    eval_data: tuple[str, ...] = ()
    """Folders of pictures with masks or boxes to evaluate on, each LAYOUT:FOLDER or a folder."""
    eval_patch_sizes: tuple[int, ...] = ()
    """Patch sizes of these evaluations. Empty: the coarsest that is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision.head != "none":
            raise UsageError(
                f"vision.head {self.vision.head}: a decoder has no image head; leave it out"
            )
        if self.vision.fit is not None:
            raise UsageError(
                f"vision.fit {self.vision.fit}: a decoder reads whole pictures as squares; leave "
                "it out"
            )
