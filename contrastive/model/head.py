"""A trained head over the locked tower's whitened features, and what trains as one module."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.residual_map import ResidualMap


class ImageHead(ResidualMap):
    """Unit-norm image embeddings of whitened features, which are centred: no part has a bias."""

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return F.normalize(super().forward(x), dim=-1)


class TextSideAndHead(nn.Module):
    """What trains where there is an image head, as the one module that ZeRO shards."""

    def __init__(self, text: nn.Module, head: ImageHead) -> None:
        super().__init__()
        self.text, self.head = text, head

    def forward(self, tokens: Any = None, whitened: Float[Tensor, "b d"] | None = None) -> tuple:
        """What the text side makes of `tokens`, and after it the embeddings of images, each where
        it is given."""
        read = () if tokens is None else self.text(tokens)
        return read if whitened is None else (*read, self.head(whitened))
