"""Heads that give a box and a vector in the texts' space for each patch (OWL-ViT).

Simple Open-Vocabulary Object Detection with Vision Transformers (Minderer et al.,
arXiv:2205.06230). What is looked for are vectors, so any words can be; nothing here knows how they
come about. None of it has an idea of the patch size but where a patch is, so one serves all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SCALE, SHIFT = 10.0, -0.5
"""Of cosines, before training: logits are about -5, as nearly all patches find nothing of a query
(RetinaNet's prior, arXiv:1708.02002, section 4.1)."""


class Detections(NamedTuple):
    """What is found in pictures; patches in the order of rows."""

    logits: Float[Tensor, "b n k"]
    """Of each patch and each query."""
    boxes: Float[Tensor, "b n 4"]
    """Middle (x, y), width and height, as shares of the picture."""


class BoxHeads(nn.Module):
    """OWL-ViT's two heads (section 3.1) over the features of patches."""

    def __init__(self, in_width: int, embed_dim: int, width: int) -> None:
        """embed_dim: width of the texts' space. width: of the layers within the box head."""
        super().__init__()
        self.class_embed = nn.Linear(in_width, embed_dim)
        self.norm = nn.LayerNorm(in_width)
        self.logit_scale = nn.Linear(in_width, 1)
        self.logit_shift = nn.Linear(in_width, 1)
        for layer, bias in ((self.logit_scale, SCALE - 1), (self.logit_shift, SHIFT)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, bias)
        self.box_head = nn.Sequential(
            nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, 4),
        )  # fmt: skip

    def forward(
        self, features: Float[Tensor, "b r c f"], queries: Float[Tensor, "k d"]
    ) -> Detections:
        """queries: unit-norm vectors of what is looked for."""
        patches = self.norm(features).flatten(1, 2)
        cosines = self.embed(features) @ queries.T
        scale = F.elu(self.logit_scale(patches).float()) + 1
        logits = (cosines + self.logit_shift(patches).float()) * scale
        bias = box_bias(*features.shape[1:3]).to(features.device)
        return Detections(logits, (self.box_head(patches).float() + bias).sigmoid())

    def embed(self, features: Float[Tensor, "b r c f"]) -> Float[Tensor, "b n d"]:
        """The unit-norm vector of each patch that queries are compared with."""
        return F.normalize(self.class_embed(features).flatten(1, 2).float(), dim=-1)

    @torch.no_grad()
    def start_at(self, weight: Float[Tensor, "d f"], bias: Float[Tensor, " d"]) -> None:
        """Let the vector of a patch be that of a whole picture with these features, to begin with:
        where texts were trained to find it."""
        self.class_embed.weight.copy_(weight)
        self.class_embed.bias.copy_(bias)


def box_bias(rows: int, columns: int) -> Float[Tensor, "n 4"]:
    """Logits of each patch's own box, to which a box head adds (section A1.2, "box bias"): what it
    predicts is relative to where the patch is."""
    down, across = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    size = torch.tensor([1 / columns, 1 / rows]).expand(rows, columns, 2)
    own = torch.cat([torch.stack([across, down], dim=-1), size], dim=-1).flatten(0, 1)
    return own.logit(eps=1e-4)
