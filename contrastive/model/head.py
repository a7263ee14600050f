"""A trained head over the locked tower's whitened features, and what trains as one module."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.vision.config import Head

EXPANSION = 4  # hidden width of the MLP over the embeddings'


class ImageHead(nn.Module):
    """Unit-norm image embeddings x + f(x) of whitened features x; f is zero before training.

    linear: f(x) = A x. mlp: f(x) = A (silu(B x) * C x), a gated linear unit (Shazeer,
    arXiv:2002.05202), by which SAIL reads locked towers (Zhang et al., arXiv:2412.04616). Without
    biases: the whitening has centred the features.
    """

    def __init__(self, kind: Head, width: int) -> None:
        """kind: not "none". width: of features and embeddings."""
        super().__init__()
        self.kind = kind
        hidden = width
        if kind == "mlp":
            hidden = EXPANSION * width
            self.gate = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, whitened: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        hidden = whitened
        if self.kind == "mlp":
            hidden = F.silu(self.gate(whitened)) * self.up(whitened)
        return F.normalize(whitened + self.out(hidden).to(whitened.dtype), dim=-1)


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
