"""A trained head over the locked tower's whitened features, and what trains as one module."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.residual_map import ResidualMap


class ImageHead(ResidualMap):
    """Unit-norm image embeddings of whitened features, which are centred: no part has a bias.

    members: as of `TextEncoder`.
    """

    def __init__(self, kind: Literal["linear", "mlp"], width: int, members: int = 1) -> None:
        super().__init__(kind, width)
        self.others = nn.ModuleList(ResidualMap(kind, width) for _ in range(members - 1))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        each = self._each(x)
        return F.normalize(torch.stack(each).sum(0), dim=-1) if self.others else each[0]

    def side_by_side(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b kd"]:
        """The embeddings by each of k members."""
        return torch.cat(self._each(x), dim=1)

    def _each(self, x: Float[Tensor, "b d"]) -> list[Float[Tensor, "b d"]]:
        maps = (super().forward, *self.others)
        return [F.normalize(one(x), dim=-1) for one in maps]


class TextSideAndHead(nn.Module):
    """What trains where there is an image head, as the one module that ZeRO shards."""

    def __init__(self, text: nn.Module, head: ImageHead) -> None:
        super().__init__()
        self.text, self.head = text, head

    def forward(self, tokens: Any = None, whitened: Float[Tensor, "b d"] | None = None) -> tuple:
        """What the text side makes of `tokens`, and after it the images' embeddings by each member,
        each where it is given."""
        read = () if tokens is None else self.text(tokens)
        return read if whitened is None else (*read, self.head.side_by_side(whitened))
