"""ViTs and FlexiViTs of google-research/big_vision, out of its npz files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contrastive.files.weights import existing_file, load_weights
from contrastive.vision.build import build_vision_tower
from contrastive.vision.resize import PositionResize
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


def load_big_vision(rest: str) -> VisionTower:
    """`FILE.npz` or `FILE.npz@SIZE`: a ViT or FlexiViT of google-research/big_vision.

    Depth, width, heads, pooling, grid and patch are read from the file; the image size is not in
    it and is 240 unless given. Prefixes `params/`, `img/` and `opt/target/` are recognised.
    """
    file, _, size = rest.partition("@")
    path = existing_file(file)
    if size and not (size.isdigit() and int(size)):
        raise UsageError(f"image size {size!r} in bigvision:{rest} is not a number of pixels")
    raw = _read_npz(path)
    try:
        return _tower(raw, rest)
    except UsageError:
        raise
    except (KeyError, IndexError, ValueError, AssertionError) as error:
        raise UsageError(f"{file} holds no whole big_vision ViT: {error!r}") from error


def _read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of the one ViT in the file, without their prefix."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            names = [n for n in archive.files if n.endswith("embedding/kernel")]
            names = [n for n in names if not n.endswith("pos_embedding/kernel")]
            if len(names) == 1:
                prefix = names[0].removesuffix("embedding/kernel")
                return {
                    n.removeprefix(prefix): torch.from_numpy(archive[n].astype(np.float32))
                    for n in archive.files
                    if n.startswith(prefix)
                }
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{file} is no npz archive of arrays: {error!r}") from error
    raise UsageError(f"{file} holds no big_vision ViT (no single embedding/kernel)")


def _tower(raw: dict[str, Tensor], rest: str) -> VisionTower:
    file, _, size = rest.partition("@")
    depth = len({n.split("/")[1] for n in raw if n.startswith("Transformer/encoderblock_")})
    if not depth:
        raise UsageError(f"{file} stores its blocks in an unknown layout (no encoderblock_0)")
    block = "Transformer/encoderblock_0/"
    patch, _, _, width = raw["embedding/kernel"].shape
    pooling = "map" if "MAPHead_0/probe" in raw else "token" if "cls" in raw else "avg"
    classes = raw["head/bias"].numel() if "head/bias" in raw else 0
    side = round(raw["pos_embedding"].shape[1] ** 0.5)
    config = TowerConfig(
        name="vit_base_patch16_224",
        args={
            "img_size": side * patch,
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": raw[block + "MultiHeadDotProductAttention_0/query/bias"].shape[0],
            "mlp_ratio": raw[block + "MlpBlock_0/Dense_0/bias"].numel() / width,
            "class_token": "cls" in raw,
            "global_pool": pooling,
            "no_embed_class": True,  # the class token gets no position
            "fc_norm": False,  # the encoder norm comes before the pooling
            "act_layer": "gelu_tanh",
            "num_classes": classes,
        },
        image_size=int(size or 240),
        positions=PositionResize("bilinear", antialias=True),
    )
    tower = build_vision_tower(config)
    if not tower.patch_sizes:
        raise UsageError(f"image size {size} in bigvision:{rest}: no patch size gives a 4x4 grid")
    load_weights(tower.net, _timm_weights(raw, depth, pooling), file)
    return tower


def _linear(raw: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Flax kernel (in..., out...) and bias to torch's weight (out, in) and bias (out,)."""
    kernel, bias = raw[name + "/kernel"], raw[name + "/bias"].reshape(-1)
    return kernel.reshape(-1, bias.numel()).T.contiguous(), bias


def _timm_weights(raw: dict[str, Tensor], depth: int, pooling: str) -> dict[str, Tensor]:
    """big_vision's arrays under timm's names, in timm's layout."""
    out = {
        "patch_embed.proj.weight": raw["embedding/kernel"].permute(3, 2, 0, 1).contiguous(),
        "patch_embed.proj.bias": raw["embedding/bias"],
        "pos_embed": raw["pos_embedding"],
        "norm.weight": raw["Transformer/encoder_norm/scale"],
        "norm.bias": raw["Transformer/encoder_norm/bias"],
    }

    def linear(target: str, *sources: str) -> None:
        parts = [_linear(raw, source) for source in sources]
        out[target + ".weight"] = torch.cat([weight for weight, _ in parts])
        out[target + ".bias"] = torch.cat([bias for _, bias in parts])

    def norm(target: str, source: str) -> None:
        out[target + ".weight"], out[target + ".bias"] = (
            raw[source + "/scale"],
            raw[source + "/bias"],
        )

    for i in range(depth):
        old, new = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention = old + "MultiHeadDotProductAttention_0/"
        norm(new + "norm1", old + "LayerNorm_0")
        norm(new + "norm2", old + "LayerNorm_1")
        linear(new + "attn.qkv", *(attention + part for part in ("query", "key", "value")))
        linear(new + "attn.proj", attention + "out")
        linear(new + "mlp.fc1", old + "MlpBlock_0/Dense_0")
        linear(new + "mlp.fc2", old + "MlpBlock_0/Dense_1")
    if "cls" in raw:
        out["cls_token"] = raw["cls"]
    if pooling == "map":
        attention = "MAPHead_0/MultiHeadDotProductAttention_0/"
        out["attn_pool.latent"] = raw["MAPHead_0/probe"]
        linear("attn_pool.q", attention + "query")
        linear("attn_pool.kv", attention + "key", attention + "value")
        linear("attn_pool.proj", attention + "out")
        norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        linear("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
        linear("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")
    if "head/bias" in raw:
        linear("head", "head")
    return out
