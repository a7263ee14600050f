"""The image tower: a network of any family, the flexible ones at any patch size.

A tower gives one pooled vector per image, before any class head. Locked, it has no gradients,
stays in eval mode whatever its parents do, and caches its resized kernels and positions, so a
forward at any patch size costs what a ViT of that patch size costs.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contrastive.vision.config import check_keep_rate
from contrastive.vision.families import family_of
from contrastive.vision.feature_terms import OWN, Term, resolve_features
from contrastive.vision.flexible_families import PlainViT
from contrastive.vision.grids import check_divides
from contrastive.vision.patch_dropout import keep_patches
from contrastive.vision.resize import default_patch_sizes
from contrastive.vision.stems import MAX_STEMS, Stem, Stems
from contrastive.vision.tower_config import TowerConfig, fingerprint, made_of
from data.errors import UsageError
from data.transform import Fit, ImageTransform


class VisionTower(nn.Module):
    """`tower(images, patch_size)`: normalised pixels to one pooled vector per image.

    Attributes: `patch_sizes` (coarsest first), `image_size` (pixels), `mean`, `std`, `embed_dim`,
    `width` (of one token).
    """

    def __init__(self, net: Any, config: TowerConfig) -> None:
        super().__init__()
        self.net: Any = net
        self.config = config
        self.family: Any = family_of(net)
        self.flexible = self.family.flexible
        self.locked = False
        self.image_size, self.mean, self.std = config.image_size, config.mean, config.std
        self.native_patch_size = self.family.patch_size(net, config.image_size)
        if not self.flexible:
            self.patch_sizes: tuple[int, ...] = (self.native_patch_size,)
        else:
            offered = default_patch_sizes(config.image_size, self.native_patch_size)
            self.patch_sizes = config.patch_sizes or offered
        width = self.family.width(net)
        self.projection: nn.Module = nn.Identity()
        if config.projection:
            self.projection = nn.Linear(width, config.projection, bias=False)
        blocks = len(net.blocks) if self.flexible else 0
        self.terms = resolve_features(config.features, blocks, self.family.terms(net), config.name)
        family: Any = self.family
        self.width = family.kernel(net).shape[0] if self.flexible else width
        self.embed_dim = sum(
            (config.projection or width) if term.token == OWN else self.width for term in self.terms
        )
        self._stems = Stems()
        self._rotary: dict[tuple, Tensor | None] = {}

    @property
    def is_plain_vit(self) -> bool:
        """Whether the network is timm's VisionTransformer with nothing added to it."""
        return type(self.family) is PlainViT

    @property
    def own_patch_size(self) -> int:
        """The stored kernel's, which a plain ViT was trained at; the finest listed where that is
        neither listed nor divides the image side."""
        own = self.native_patch_size
        fits = own in self.patch_sizes or self.image_size % own == 0
        return own if fits or not self.flexible else self.patch_sizes[-1]

    # ---- lock ------------------------------------------------------------------------------

    def lock(self) -> "VisionTower":
        """Turn gradients off and stay in eval mode for good. Returns self."""
        self.requires_grad_(False)
        self.locked = True
        return self.eval()

    def use_transform(self, version: int | None = None, fit: Fit | None = None) -> "VisionTower":
        """Read pixels by this version and fit of `ImageTransform`, where given. Returns self."""
        version = version or self.config.transform
        self.config = replace(self.config, transform=version, fit=fit or self.config.fit)
        return self

    def offer_own_size(self, alone: bool = True) -> "VisionTower":
        """List the patch size that the network was trained at, even where it does not divide the
        image side: then a strip at the right and at the bottom is not read, as by the library that
        trained it. Returns self.

        alone: and no other; others that divide the image side are still accepted.
        """
        own = self.native_patch_size
        sizes = {own} if alone else {own, *self.patch_sizes}
        self.patch_sizes = tuple(sorted(sizes, reverse=True))
        self.config = replace(self.config, patch_sizes=self.patch_sizes)
        return self

    def train(self, mode: bool = True) -> "VisionTower":
        self._stems.kept.clear()  # ZeRO changes weights where no version counter shows it
        return super().train(mode and not self.locked)

    # ---- forward ---------------------------------------------------------------------------

    def check_patch_size(self, patch_size: int, shape: tuple[int, int] | None = None) -> None:
        """Raise `UsageError` unless this tower runs at `patch_size` on images of `shape`, which is
        (height, width) in pixels; when not given, a square of `image_size`."""
        square = (self.image_size, self.image_size)
        shape = shape or square
        if not self.flexible:
            if patch_size != self.patch_sizes[0]:
                raise UsageError(
                    f"patch size {patch_size}: {self.config.name} cannot change its patch "
                    f"size; allowed: {self.patch_sizes[0]}"
                )
            if shape[0] != shape[1]:
                raise UsageError(
                    f"images of height {shape[0]} and width {shape[1]} px: {self.config.name} "
                    f"reads squares alone; allowed: {self.image_size} x {self.image_size} px"
                )
        elif shape != square or not self._is_own_size(patch_size):  # which need not divide it
            check_divides(patch_size, shape, self.patch_sizes, self.native_patch_size)

    def _is_own_size(self, patch_size: int) -> bool:
        """Whether `offer_own_size` may have listed it."""
        return patch_size in self.config.patch_sizes and patch_size == self.native_patch_size

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        patch_size: int | None = None,
        keep: float | Int[Tensor, "b k"] = 1.0,
    ) -> Float[Tensor, "b d"]:
        """Pooled features, float32, not unit-normed; `patch_size` defaults to the finest listed.

        images: already normalised by `mean` and `std`, height and width divisible by `patch_size`
        (of an own size that does not divide `image_size`, see `offer_own_size`); towers with one
        patch size read squares alone.
        keep: the keep rate, a share of the patches, or the numbers of those to keep per image
        (`patch_dropout`).
        """
        patch_size = self.patch_sizes[-1] if patch_size is None else patch_size
        height, width = images.shape[-2:]
        self.check_patch_size(patch_size, (height, width))
        self._check_keep(keep)
        images = images.to(next(self.net.parameters()).dtype)
        if not self.flexible:
            return self.projection(self.family.features(self.net, images)).float()
        tokens = self.embed_patches(images, patch_size, keep)
        grid = (height // patch_size, width // patch_size)
        rotary = self.rotary_positions(grid, keep, len(images))
        if self.terms == (Term(OWN),):
            return self.pool(self.family.body(self.net, tokens, rotary)).float()
        after = self.family.after(self.net, tokens, rotary, self.needed_blocks)
        return self.read_blocks(after).float()

    @property
    def needed_blocks(self) -> set[int]:
        """The blocks, counted from 1, after which `read_blocks` reads the tokens."""
        return {term.block or len(self.net.blocks) for term in self.terms}

    def read_blocks(self, after: Mapping[int, Float[Tensor, "b n d"]]) -> Float[Tensor, "b e"]:
        """The vectors that `config.features` names, of the tokens after each needed block."""
        last = len(self.net.blocks)
        normed: dict[int | None, Tensor] = {}
        for term in self.terms:
            if term.block not in normed:
                normed[term.block] = self.normed(term, after[term.block or last])
        return torch.cat([self.pooled(term, normed[term.block]) for term in self.terms], dim=-1)

    def normed(self, term: Term, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """Tokens after a term's block by the norm that the term reads them through."""
        if term.block is None:
            return self.family.finish(self.net, tokens)
        after = getattr(self.net, "fc_norm", None)  # where the norm follows the pooling
        eps = getattr(self.net.norm, "eps", getattr(after, "eps", 1e-6))
        return F.layer_norm(tokens, (self.width,), eps=eps)

    def pooled(self, term: Term, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
        """A term's vector of what `normed` gives."""
        if term.token == OWN:
            return self.pool(normed)
        cls = term.token == "cls"
        vector = normed[:, 0] if cls else normed[:, self.num_prefix_tokens :].mean(1)
        return self.norm_after_pooling(vector) if term.block is None else vector

    def norm_after_pooling(self, vectors: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The network's own norm, where it follows the pooling."""
        return getattr(self.net, "fc_norm", nn.Identity())(vectors)

    def _check_keep(self, keep: float | Int[Tensor, "b k"]) -> None:
        if not isinstance(keep, Tensor):
            check_keep_rate("keep", keep)
            if keep == 1:
                return
        if not self.flexible:
            raise UsageError(f"{self.config.name} cannot leave out patches; allowed: keep 1")

    def embed_patches(
        self,
        images: Float[Tensor, "b 3 h w"],
        patch_size: int,
        keep: float | Int[Tensor, "b k"] = 1.0,
    ) -> Float[Tensor, "b n d"]:
        """Tokens with positions, prefix tokens (class, registers) first."""
        rows, columns = (side // patch_size for side in images.shape[-2:])
        stem = self.stem(patch_size, (rows, columns))
        images = images[..., : rows * patch_size, : columns * patch_size]
        return stem.place(self.family.patches(self.net, images, stem.kernel), keep)

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
        """The tower's own pooling (class token, mean, or attention) and what follows it."""
        return self.projection(self.family.pool(self.net, tokens))

    def stem(self, patch_size: int, grid: tuple[int, int]) -> Stem:
        """The stem at one patch size, for a grid of (rows, columns)."""
        return self._stems(self.family, self.net, self.config.positions, patch_size, grid)

    def rotary_positions(
        self, grid: tuple[int, int], keep: float | Int[Tensor, "b k"] = 1.0, num_images: int = 1
    ) -> Tensor | None:
        """Sines and cosines of the patches that are kept; None where positions are not rotary."""
        weight = self.family.kernel(self.net)
        known, key = self._rotary, (grid, weight.device)
        try:
            rotary = known[key]
        except KeyError:
            if len(known) >= MAX_STEMS:  # another, as other threads may be reading this one
                self._rotary = known = {}
            with torch.inference_mode(False), torch.no_grad():
                known[key] = rotary = self.family.rotary(self.net, grid)
        if rotary is None or not (isinstance(keep, Tensor) or keep < 1):
            return rotary
        return keep_patches(rotary.expand(num_images, -1, -1), keep)[:, None]

    def compile_blocks(self) -> None:
        """torch.compile the blocks, which cost most; compiled once for all patch sizes."""
        blocks = getattr(self.net, "blocks", self.net)
        each = isinstance(blocks, nn.ModuleList) or self.terms != (Term(OWN),)
        for part in blocks if each else [blocks]:
            part.compile(dynamic=True)

    # ---- facts -----------------------------------------------------------------------------

    @property
    def transform(self) -> ImageTransform:
        """How an image file becomes this tower's input."""
        config = self.config
        return ImageTransform(self.image_size, self.mean, self.std, config.transform, config.fit)

    def describe(self) -> dict[str, Any]:
        """What `TowerConfig.from_json` reads back."""
        return self.config.to_json() | {"patch_sizes": self.patch_sizes}

    def num_tokens(self, patch_size: int, shape: tuple[int, int] | None = None) -> int:
        """Sequence length of the transformer (patches and prefix tokens), of images of `shape`;
        when not given, squares of `image_size`."""
        self.check_patch_size(patch_size, shape)
        height, width = shape or (self.image_size, self.image_size)
        return (height // patch_size) * (width // patch_size) + self.num_prefix_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens and registers that stand before the patches."""
        return sum(t.shape[1] for t in self.family.prefix(self.net)) if self.flexible else 0

    @lru_cache(maxsize=64)  # noqa: B019  (a handful of towers per process, each kept anyway)
    def gflops(self, patch_size: int, shape: tuple[int, int] | None = None) -> float:
        """10^9 floating-point operations per image (2 x multiply-adds), counted by torch.

        shape: (height, width) in pixels; when not given, a square of `image_size`."""
        weight = next(self.net.parameters())
        image = weight.new_zeros(1, 3, *(shape or (self.image_size, self.image_size)))
        with torch.no_grad():
            self(image, patch_size)  # resizes kernel and positions, once, which is not counted
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(image, patch_size)
        return counter.get_total_flops() / 1e9

    @property
    def made_of(self) -> dict[str, str]:
        """What `fingerprint` covers, by name, so that an error can say what differs; the weights
        last."""
        return made_of(self, self.config, self.transform)

    @property
    def fingerprint(self) -> str:
        """Changes when the weights, their dtype, the resize rule or the transform change."""
        return fingerprint(self, self.config, self.transform)
