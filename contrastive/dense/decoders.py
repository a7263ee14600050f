"""Decoders: features of patches to logits of classes, whatever the grid.

Each takes features (b, rows, cols, f) and gives logits (b, classes, rows, cols), which are then
resized bilinearly; those of boxes are `contrastive.dense.box_heads`. None has an idea of the patch
size, so one serves all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.dense.box_heads import BoxHeads
from contrastive.dense.config import HEAD_WIDTH, DecoderConfig

NUM_BLOCKS = 2  # of Segmenter's decoder


class LinearDecoder(nn.Module):
    """A linear map of each patch."""

    def __init__(self, in_width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_width, num_classes)

    def forward(self, features: Float[Tensor, "b r c f"]) -> Float[Tensor, "b k r c"]:
        return self.head(features).permute(0, 3, 1, 2)


class MaskTransformer(nn.Module):
    """Segmenter's decoder (Strudel et al., arXiv:2105.05633, section 3.2).

    Patches and an embedding of each class attend to each other in two blocks; a logit is the cosine
    of patch and class, each after a linear map, the classes' then normed together. Without dropout.
    """

    def __init__(self, in_width: int, width: int, num_classes: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # slow to import

        self.enter = nn.Linear(in_width, width)
        self.classes = nn.Parameter(torch.empty(1, num_classes, width))
        nn.init.trunc_normal_(self.classes, std=0.02)
        heads = width // HEAD_WIDTH
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True) for _ in range(NUM_BLOCKS))
        )
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        for layer in (self.patch_projection, self.class_projection):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, features: Float[Tensor, "b r c f"]) -> Float[Tensor, "b k r c"]:
        grid = features.shape[1:3]
        patches = self.enter(features).flatten(1, 2)
        classes = self.classes.expand(len(patches), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([patches, classes], dim=1)))
        patches, classes = tokens.split([patches.shape[1], classes.shape[1]], dim=1)
        patches = F.normalize(self.patch_projection(patches), dim=-1)
        classes = F.normalize(self.class_projection(classes), dim=-1)
        logits = self.mask_norm(patches @ classes.transpose(1, 2))
        return logits.transpose(1, 2).unflatten(2, grid)


class MlpDecoder(nn.Module):
    """SegFormer's decoder (Xie et al., arXiv:2105.15203, section 3.2) on the blocks of a plain ViT.

    A linear map of each block's features to one width, the results joined and mixed, then a linear
    map. The norm after the mixing is LayerNorm where SegFormer has BatchNorm, whose averages would
    be over patch sizes that differ and over one rank's pictures.
    """

    def __init__(self, in_widths: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.in_widths = tuple(in_widths)
        self.enter = nn.ModuleList(nn.Linear(one, width) for one in in_widths)
        self.mix = nn.Linear(len(in_widths) * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, features: Float[Tensor, "b r c f"]) -> Float[Tensor, "b k r c"]:
        parts = features.split(self.in_widths, dim=-1)
        joined = torch.cat([e(p) for e, p in zip(self.enter, parts, strict=True)], dim=-1)
        return self.head(F.relu(self.norm(self.mix(joined)))).permute(0, 3, 1, 2)


def build_decoder(
    cfg: DecoderConfig, in_widths: Sequence[int], num_classes: int, embed_dim: int = 0
) -> nn.Module:
    """in_widths: of what the features join, one a block. num_classes: background included.
    embed_dim: width of the texts' space, for boxes."""
    if cfg.kind == "boxes":
        return BoxHeads(sum(in_widths), embed_dim, cfg.width)
    if cfg.kind == "linear":
        return LinearDecoder(sum(in_widths), num_classes)
    if cfg.kind == "mask_transformer":
        return MaskTransformer(sum(in_widths), cfg.width, num_classes)
    return MlpDecoder(in_widths, cfg.width, num_classes)
