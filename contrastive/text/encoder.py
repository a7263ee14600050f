"""The text encoder: a text tower and its projection to the image tower's embedding dimension."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower


class TextEncoder(nn.Module):
    """A text tower and a bias-free projection to the image tower's width (arXiv:2111.07991)."""

    def __init__(self, tower: TextTower, embed_dim: int) -> None:
        super().__init__()
        self.tower = tower
        self.projection = nn.Linear(tower.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)
        own = tower.own_projection
        if own is not None and own.shape == self.projection.weight.shape:
            self.projection.weight.data.copy_(own)

    def forward(self, tokens: TokenBatch | PackedTokens) -> Float[Tensor, "m d"]:
        """Unit-norm text embeddings, float32 at least."""
        projected = self.projection(self.pool(tokens))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return nn.functional.normalize(projected.to(dtype), dim=-1)

    def pool(self, tokens: TokenBatch | PackedTokens) -> Float[Tensor, "m w"]:
        """One vector per text, before the projection."""
        if isinstance(tokens, PackedTokens):
            return self.tower.forward_packed(tokens)
        return self.tower(tokens.groups)[: tokens.num_texts]
