"""A small trained map that starts as the identity: what heads of images and of texts are."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EXPANSION = 4  # hidden width of the MLP over its input's


class ResidualMap(nn.Module):
    """x + f(x); f is zero before training.

    linear: f(x) = A x. mlp: f(x) = A (silu(B x) * C x), a gated linear unit (Shazeer,
    arXiv:2002.05202), by which SAIL reads locked towers (Zhang et al., arXiv:2412.04616).
    """

    def __init__(self, kind: Literal["linear", "mlp"], width: int) -> None:
        super().__init__()
        self.kind = kind
        hidden = width
        if kind == "mlp":
            hidden = EXPANSION * width
            self.gate = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        hidden = x
        if self.kind == "mlp":
            hidden = F.silu(self.gate(x)) * self.up(x)
        return x + self.out(hidden).to(x.dtype)
