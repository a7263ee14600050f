"""ViTs that run at any patch size, each cut into a stem, a body and a pooling.

The stem (a patch kernel, prefix tokens, positions) is all that a patch size changes.
"""

from collections.abc import Collection
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from contrastive.vision.fixed_families import Family
from contrastive.vision.resize import PositionResize, resample_position_grid


class PlainViT(Family):
    """timm's VisionTransformer with the stem and positions of its own, whatever its pooling."""

    flexible = True

    def fits(self, net: Any) -> bool:
        from timm.models.vision_transformer import VisionTransformer

        names = ("forward_features", "forward_head", "_pos_embed")
        return _inherits(net, VisionTransformer, names) and _patchifies(net)

    def patch_size(self, net: Any, image_size: int) -> int:
        return int(net.patch_embed.proj.kernel_size[0])

    def stem(self, net: Any) -> Any:
        """The module that embeds patches; has a `proj` and a `norm`."""
        return net.patch_embed

    def stem_weights(self, net: Any) -> list[Tensor]:
        """What the stem is computed from, the kernel first."""
        own = [net.pos_embed, *self.prefix(net)]
        return [net.patch_embed.proj.weight, *(p for p in own if p is not None)]

    def kernel(self, net: Any) -> Float[Tensor, "d 3 p p"]:
        """The stored patch kernel."""
        return net.patch_embed.proj.weight

    def class_token(self, net: Any) -> Float[Tensor, "1 1 d"] | None:
        return net.cls_token

    def prefix(self, net: Any) -> list[Float[Tensor, "1 k d"]]:
        """Tokens before the patches: class, registers."""
        return [t for t in (net.cls_token, net.reg_token) if t is not None]

    def positions(
        self, net: Any
    ) -> tuple[Float[Tensor, "1 k d"] | None, Float[Tensor, "1 n d"] | None]:
        """(positions of the prefix tokens, the stored grid); None where there is none."""
        if net.pos_embed is None:
            return None, None
        slots = 0 if net.no_embed_class else net.num_prefix_tokens
        return (net.pos_embed[:, :slots] if slots else None), net.pos_embed[:, slots:]

    def resized_positions(
        self, net: Any, grid: tuple[int, int], rule: PositionResize
    ) -> Float[Tensor, "1 n d"] | None:
        """The stored grid at `grid` = (rows, columns); None where there is none."""
        stored = self.positions(net)[1]
        return None if stored is None else resample_position_grid(stored, grid, rule)

    def rotary(self, net: Any, grid: tuple[int, int]) -> Float[Tensor, "n e"] | None:
        """Sines and cosines for (rows, columns); None where positions are not rotary."""
        return None

    def patches(
        self, net: Any, images: Float[Tensor, "b 3 h w"], kernel: Float[Tensor, "d 3 p p"]
    ) -> Float[Tensor, "b n d"]:
        """Patch tokens without positions."""
        stem, side = self.stem(net), kernel.shape[-1]
        if images.dtype == torch.bfloat16 or torch.is_autocast_enabled(images.device.type):
            # A bfloat16 convolution with kernels this large is slow on a CPU. In float32 it is not,
            # and a product of rows this long may differ in its last bit from run to run.
            tokens = F.linear(cut_patches(images, side), kernel.flatten(1), stem.proj.bias)
        else:
            tokens = F.conv2d(images, kernel, stem.proj.bias, stride=side)
            tokens = tokens.flatten(2).transpose(1, 2)
        return stem.norm(tokens)

    def body(
        self, net: Any, tokens: Float[Tensor, "b n d"], rotary: Tensor | None
    ) -> Float[Tensor, "b m d"]:
        """Tokens after the blocks and their norm."""
        return self.finish(net, net.blocks(self.enter(net, tokens)))

    def enter(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What happens between the stem and the blocks."""
        return net.norm_pre(net.pos_drop(tokens))

    def block(
        self, block: Any, tokens: Float[Tensor, "b n d"], rotary: Tensor | None, within: Any
    ) -> Float[Tensor, "b n d"]:
        """One block."""
        return block(tokens) if within is None else block(tokens, attn_mask=within)

    def finish(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """The norm after the blocks."""
        return net.norm(tokens)

    def after(
        self,
        net: Any,
        tokens: Float[Tensor, "b n d"],
        rotary: Tensor | None,
        blocks: Collection[int],
        within: Any = None,
    ) -> dict[int, Float[Tensor, "b n d"]]:
        """Tokens after these blocks, counted from 1; none that follows them is computed.

        within: what stands for the mask of a sequence of several pictures.
        """
        tokens, found = self.enter(net, tokens), {}
        for number, block in enumerate(islice(net.blocks, max(blocks)), 1):
            tokens = self.block(block, tokens, rotary, within)
            if number in blocks:
                found[number] = tokens
        return found

    def terms(self, net: Any) -> tuple[str, ...]:
        """What `features` may name: of the last block, and (`@`) of any."""
        if self.class_token(net) is None:
            return ("own", "mean", "mean@")
        return ("own", "cls", "mean", "cls@", "mean@")

    def pool(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The network's own pooling and what follows it."""
        return net.forward_head(tokens, pre_logits=True)


class DistilledViT(PlainViT):
    """DeiT with a distillation token beside the class token; pools both by their mean."""

    def fits(self, net: Any) -> bool:
        from timm.models.deit import VisionTransformerDistilled

        return type(net) is VisionTransformerDistilled and _patchifies(net)

    def prefix(self, net: Any) -> list[Float[Tensor, "1 k d"]]:
        return [net.cls_token, net.dist_token]


class ClassLast(PlainViT):
    """CaiT: the class token has no position and joins the patches in the last blocks only."""

    def fits(self, net: Any) -> bool:
        from timm.models.cait import Cait

        return _inherits(net, Cait, ("forward_features", "forward_head")) and _patchifies(net)

    def prefix(self, net: Any) -> list[Float[Tensor, "1 k d"]]:
        return []

    def positions(self, net: Any) -> tuple[None, Float[Tensor, "1 n d"]]:
        return None, net.pos_embed

    def enter(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return net.pos_drop(tokens)

    def finish(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return net.norm(net.forward_cls(tokens))

    def terms(self, net: Any) -> tuple[str, ...]:
        return ("own", "cls", "mean@")  # no class token among the patches of a block


class Rotary(PlainViT):
    """EVA-02 and its kin: rotary positions, with or without a stored grid.

    Every grid, each axis for itself, spans the angles that the tower's own grid spans
    (arXiv:2303.11331, section 2); DINOv3's is scaled as the network says.
    """

    def fits(self, net: Any) -> bool:
        from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
        from timm.models.eva import Eva

        known = (type(None), RotaryEmbeddingCat, RotaryEmbeddingDinoV3)
        names = ("forward_features", "forward_head", "_pos_embed")
        return _inherits(net, Eva, names) and _patchifies(net) and type(net.rope) in known

    def rotary(self, net: Any, grid: tuple[int, int]) -> Float[Tensor, "n e"] | None:
        from timm.layers import RotaryEmbeddingCat
        from timm.layers.pos_embed_sincos import build_rotary_pos_embed

        rope: Any = net.rope
        if not isinstance(rope, RotaryEmbeddingCat):
            return None if rope is None else rope.get_embed(list(grid))
        bands: Any = rope.bands
        parts = build_rotary_pos_embed(
            list(grid),
            bands=bands,
            in_pixels=rope.in_pixels,
            ref_feat_shape=rope.ref_feat_shape or net.patch_embed.grid_size,
            grid_offset=rope.grid_offset,
            grid_indexing=rope.grid_indexing,
            rotate_half=rope.rotate_half,
            dtype=torch.float32,
            grid_type=rope.grid_type,
            normalize_coords=rope.normalize_coords,
        )
        return torch.cat(parts, -1)

    def body(
        self, net: Any, tokens: Float[Tensor, "b n d"], rotary: Tensor | None
    ) -> Float[Tensor, "b m d"]:
        last = len(net.blocks)
        return self.finish(net, self.after(net, tokens, rotary, {last})[last])

    def block(
        self, block: Any, tokens: Float[Tensor, "b n d"], rotary: Tensor | None, within: Any
    ) -> Float[Tensor, "b n d"]:
        return block(tokens, rope=rotary, attn_mask=within)


class NaFlex(PlainViT):
    """timm's NaFlexViT; it stores a square grid, or a row and a column to add."""

    def fits(self, net: Any) -> bool:
        from timm.models.naflexvit import NaFlexVit

        if not _inherits(net, NaFlexVit, ("forward_features", "forward_head")):
            return False
        stem = net.embeds
        square = stem.pos_embed_grid_size and len(set(stem.pos_embed_grid_size)) == 1
        plain = stem.norm_input is None and not stem.pos_embed_align_corners
        return bool(
            plain
            and net.rope is None
            and (square or stem.pos_embed_type == "none")
            and len(set(stem.patch_size)) == 1
        )

    def patch_size(self, net: Any, image_size: int) -> int:
        return int(net.embeds.patch_size[0])

    def stem(self, net: Any) -> Any:
        return net.embeds

    def stem_weights(self, net: Any) -> list[Tensor]:
        stem = net.embeds
        own = [stem.pos_embed, stem.pos_embed_y, stem.pos_embed_x, *self.prefix(net)]
        return [stem.proj.weight, *(p for p in own if p is not None)]

    def kernel(self, net: Any) -> Float[Tensor, "d 3 p p"]:
        stem, weight = net.embeds, net.embeds.proj.weight
        if not stem.is_linear:
            return weight
        p = stem.patch_size[0]
        if stem.channels_last:
            return weight.reshape(-1, p, p, 3).permute(0, 3, 1, 2)
        return weight.reshape(-1, 3, p, p)

    def class_token(self, net: Any) -> Float[Tensor, "1 1 d"] | None:
        return net.embeds.cls_token

    def prefix(self, net: Any) -> list[Float[Tensor, "1 k d"]]:
        return [t for t in (net.embeds.cls_token, net.embeds.reg_token) if t is not None]

    def positions(self, net: Any) -> tuple[None, Float[Tensor, "1 n d"] | None]:
        stem = net.embeds
        if stem.pos_embed_type == "none":
            return None, None
        if stem.pos_embed_type == "factorized":
            return None, (stem.pos_embed_y[:, :, None] + stem.pos_embed_x[:, None]).flatten(1, 2)
        return None, stem.pos_embed.flatten(1, 2)

    def resized_positions(
        self, net: Any, grid: tuple[int, int], rule: PositionResize
    ) -> Float[Tensor, "1 n d"] | None:
        """Of networks that keep the aspect ratio of positions too, the upper left part of a square
        grid of the longer side."""
        if not net.embeds.pos_embed_ar_preserving:
            return super().resized_positions(net, grid, rule)
        (rows, columns), side = grid, max(grid)
        square = super().resized_positions(net, (side, side), rule)
        if square is None or rows == columns:
            return square
        return square.unflatten(1, (side, side))[:, :rows, :columns].flatten(1, 2)

    def enter(self, net: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return net.norm_pre(net.embeds.pos_drop(tokens))

    def position_rule(self, net: Any) -> PositionResize:
        stem = net.embeds
        if stem.pos_embed_type == "factorized":  # a sum of row and column, each resized linearly
            return PositionResize("bilinear", antialias=False)
        return PositionResize(stem.pos_embed_interp_mode, stem.pos_embed_antialias)


def cut_patches(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n e"]:
    """Patches row by row, each flattened like a kernel (e = c * patch_size^2)."""
    b, c, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(b, c, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)


def _inherits(net: Any, base: type, names: tuple[str, ...]) -> bool:
    """Whether `net` is a `base` that overrides none of these methods, so computes alike."""
    return isinstance(net, base) and all(
        getattr(type(net), name) is getattr(base, name) for name in names
    )


def _patchifies(net: Any) -> bool:
    """Whether the stem is one convolution over square patches that do not overlap."""
    from timm.layers import PatchEmbed

    stem = net.patch_embed
    return (
        isinstance(stem, PatchEmbed)
        and stem.proj.kernel_size == stem.proj.stride
        and len(set(stem.proj.kernel_size)) == 1
    )
