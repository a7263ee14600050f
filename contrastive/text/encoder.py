"""The text encoder: a text tower and its projection to the image tower's embedding dimension."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.distributed import send
from contrastive.residual_map import ResidualMap
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower


@dataclass(frozen=True)
class TextVectors:
    """What a frozen tower made of m texts."""

    vectors: Float[Tensor, "m w"]

    def to(self, device: torch.device | str) -> "TextVectors":
        return TextVectors(send(self.vectors, device))


class TextEncoder(nn.Module):
    """A text tower and a bias-free projection to the image tower's width (arXiv:2111.07991).
    Between them there may be a head."""

    def __init__(
        self, tower: TextTower, embed_dim: int, head: Literal["none", "mlp"] = "none"
    ) -> None:
        super().__init__()
        self.tower = tower
        self.head = None if head == "none" else ResidualMap(head, tower.width)
        self.projection = nn.Linear(tower.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)
        own = tower.own_projection
        if own is not None and own.shape == self.projection.weight.shape:
            self.projection.weight.data.copy_(own)

    def forward(self, tokens: TokenBatch | PackedTokens | TextVectors) -> Float[Tensor, "m d"]:
        """Unit-norm text embeddings, float32 at least."""
        projected = self.project(self.pool(tokens))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return nn.functional.normalize(projected.to(dtype), dim=-1)

    def project(self, vectors: Float[Tensor, "m w"]) -> Float[Tensor, "m d"]:
        """Head and projection of the tower's vectors; not of unit norm."""
        return self.projection(vectors if self.head is None else self.head(vectors))

    def pool(self, tokens: TokenBatch | PackedTokens | TextVectors) -> Float[Tensor, "m w"]:
        """One vector per text, before head and projection."""
        if isinstance(tokens, TextVectors):
            return tokens.vectors
        if isinstance(tokens, PackedTokens):
            return self.tower.forward_packed(tokens)
        return self.tower(tokens.groups)[: tokens.num_texts]
