"""The text encoder: a text tower and its projection to the image tower's embedding dimension."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.residual_map import ResidualMap
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower


@dataclass(frozen=True)
class TextVectors:
    """What a frozen tower made of m texts."""

    vectors: Float[Tensor, "m w"]

    def to(self, device: torch.device | str) -> "TextVectors":
        return TextVectors(self.vectors.to(device, non_blocking=True))


class TextMap(nn.Module):
    """A bias-free projection to the embeddings' width (arXiv:2111.07991), and before it perhaps a
    head."""

    def __init__(self, width: int, embed_dim: int, head: Literal["none", "mlp"]) -> None:
        super().__init__()
        self.head = None if head == "none" else ResidualMap(head, width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)


class TextEncoder(nn.Module):
    """A text tower, and what leads its vectors to the images' embeddings.

    members: maps that are trained side by side. A text's embedding is the mean of theirs.
    """

    def __init__(
        self,
        tower: TextTower,
        embed_dim: int,
        head: Literal["none", "mlp"] = "none",
        members: int = 1,
    ) -> None:
        super().__init__()
        self.tower = tower
        first, *others = (TextMap(tower.width, embed_dim, head) for _ in range(members))
        self.head, self.projection = first.head, first.projection  # named so in files
        self.others = nn.ModuleList(others)
        own = tower.own_projection
        if own is not None and own.shape == self.projection.weight.shape:
            self.set_projection(own)

    @property
    def members(self) -> int:
        return 1 + len(self.others)

    def set_projection(self, weight: Float[Tensor, "d w"]) -> None:
        """Of every member."""
        for one in (self, *self.others):
            one.projection.weight.data.copy_(weight)

    def forward(self, tokens: TokenBatch | PackedTokens | TextVectors) -> Float[Tensor, "m d"]:
        """Unit-norm text embeddings, float32 at least."""
        return _unit_norm(self.project(self.pool(tokens)))

    def project(self, vectors: Float[Tensor, "m w"]) -> Float[Tensor, "m d"]:
        """Head and projection of the tower's vectors; not of unit norm."""
        if not self.others:
            return _mapped(self, vectors)
        return torch.stack(self._each(vectors)).sum(0)

    def side_by_side(
        self, tokens: TokenBatch | PackedTokens | TextVectors
    ) -> Float[Tensor, "m kd"]:
        """Unit-norm embeddings by each of k members."""
        return torch.cat(self._each(self.pool(tokens)), dim=1)

    def _each(self, vectors: Float[Tensor, "m w"]) -> list[Float[Tensor, "m d"]]:
        return [_unit_norm(_mapped(one, vectors)) for one in (self, *self.others)]

    def pool(self, tokens: TokenBatch | PackedTokens | TextVectors) -> Float[Tensor, "m w"]:
        """One vector per text, before head and projection."""
        if isinstance(tokens, TextVectors):
            return tokens.vectors
        if isinstance(tokens, PackedTokens):
            return self.tower.forward_packed(tokens)
        return self.tower(tokens.groups)[: tokens.num_texts]


def _mapped(one: TextMap | TextEncoder, vectors: Float[Tensor, "m w"]) -> Float[Tensor, "m d"]:
    return one.projection(vectors if one.head is None else one.head(vectors))


def _unit_norm(projected: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    dtype = torch.promote_types(projected.dtype, torch.float32)
    return nn.functional.normalize(projected.to(dtype), dim=-1)
