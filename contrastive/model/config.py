"""The contrastive loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.errors import UsageError


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and what counts as a positive pair."""

    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    positives: Literal["pair", "caption"] = "pair"
    """pair: a text's own image. caption: all images of the batch with the same captions."""
    temperature_init: float = 10.0
    """First logit scale, which big_vision calls temperature: SigLIP 10, CLIP 14.3."""
    bias_init: float = -10.0
    """First bias of the sigmoid loss: SigLIP -10, big_vision at batch 512 -2.71."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature_init <= 100:
            raise UsageError(f"loss.temperature_init {self.temperature_init}: above 0, at most 100")

    def as_json(self) -> dict[str, Any]:
        """As a model's config.json holds it, by the names of format 1."""
        return {_KEYS.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LossConfig":
        names = {key: name for name, key in _KEYS.items()}
        return cls(**{names.get(key, key): value for key, value in values.items()})


_KEYS = {"temperature_init": "start_scale", "bias_init": "start_bias"}
