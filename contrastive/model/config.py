"""The contrastive loss."""

from dataclasses import dataclass
from typing import Literal

from data.errors import UsageError


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and what counts as a positive pair."""

    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    positives: Literal["pair", "caption"] = "pair"
    """pair: a text's own image. caption: all images of the batch with the same captions."""
    start_scale: float = 10.0
    """The temperature's multiplier t at the start. SigLIP 10; CLIP 14.3."""
    start_bias: float = -10.0
    """The sigmoid loss's bias at the start. SigLIP -10; big_vision's batches of 512 -2.71."""

    def __post_init__(self) -> None:
        if not 0 < self.start_scale <= 100:
            raise UsageError(f"--loss.start-scale {self.start_scale}: above 0, at most 100")
