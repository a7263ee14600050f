"""Image towers of transformers: the image part of CLIP or SigLIP, and SegFormer's encoder."""

import sys
from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SegformerModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import logging as transformers_logging

from contrastive.distributed import is_main
from contrastive.files.transformers import first_line, no_progress_bars
from contrastive.files.weights import three_numbers
from contrastive.vision.formats.pixel_statistics import HALF, IMAGENET, OPENAI
from contrastive.vision.formats.timm_vit import PLAIN_VIT, rename_keys, timm_vit
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError
from data.progress import say_once

TRANSFORMERS_NAMES = (
    ("vision_model.", ""),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.", "blocks."),
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    ("layer_norm", "norm"),
    ("self_attn.out_proj.", "attn.proj."),
    ("self_attn.", "attn."),
    ("head.probe", "attn_pool.latent"),
    ("head.layernorm.", "attn_pool.norm."),
    ("head.mlp.", "attn_pool.mlp."),
    ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.attention.in_proj_", "attn_pool.in_proj."),
)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def load_transformers(name: str) -> VisionTower:
    """A folder or hub name: the image part of a CLIP or SigLIP checkpoint, or SegFormer's encoder.

    safetensors only. Without a preprocessor_config.json, pixels are normalised as is usual for the
    family.
    """
    config = read_model_config(name)
    kind = config.model_type
    if kind == "segformer":
        return _segformer(name, config)
    family = kind.removesuffix("_vision_model")
    if family not in ("clip", "siglip", "siglip2"):
        raise UsageError(
            f"transformers:{name} is of type {kind}; allowed: clip, siglip, siglip2, their vision "
            "models, segformer"
        )
    vision = getattr(config, "vision_config", config)
    cls: Any = SiglipVisionModel if family == "siglip" else Siglip2VisionModel
    if family == "clip":
        projected = "CLIPVisionModel" not in (config.architectures or ())
        cls = CLIPVisionModelWithProjection if projected else CLIPVisionModel
        vision.projection_dim = config.projection_dim
    weights = _pretrained(cls, name, vision).state_dict()
    return image_half(name, weights, vision, family == "clip")


def read_model_config(name: str) -> Any:
    """transformers' configuration in a folder or of a hub name. Raises `UsageError`."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load image tower transformers:{name}: {first_line(error)}"
        ) from error


def image_half(name: str, weights: dict[str, Tensor], vision: Any, clip: bool) -> VisionTower:
    """The image part of a CLIP, or (clip false) of a SigLIP.

    weights: of that part, with the projection. vision: its configuration. A NaFlex one, which
    transformers runs at any shape of a budget of patches (SigLIP 2, arXiv:2502.14786), is given
    squares: as many patches as the budget has.
    """
    eps, activation = vision.layer_norm_eps, vision.hidden_act
    pools = getattr(vision, "vision_use_head", True)
    if eps not in PLAIN_VIT or activation not in ACTIVATIONS or not pools:
        raise UsageError(
            f"transformers:{name} has layer_norm_eps {eps}, hidden_act {activation}; allowed: "
            f"{', '.join(map(str, PLAIN_VIT))}; {', '.join(ACTIVATIONS)}; for SigLIP a pooling head"
        )
    naflex = not hasattr(vision, "image_size")
    own_side = isqrt(vision.num_patches) * vision.patch_size if naflex else vision.image_size
    args = {
        "img_size": own_side,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "class_token": clip,
        "pre_norm": clip,
        "global_pool": "token" if clip else "map",
        "fc_norm": False,
        "act_layer": ACTIVATIONS[activation],
        "num_classes": 0,
    }
    weights = rename_keys(weights, TRANSFORMERS_NAMES)
    projection = weights.pop("visual_projection.weight", None)
    mean, std, side = _pixels(name, OPENAI if clip else HALF, own_side)
    facts = {"image_size": side if naflex else own_side, "mean": mean, "std": std}
    facts["fit"] = "crop" if clip else "squash"
    if naflex:
        kernel, p = weights["patch_embed.proj.weight"], vision.patch_size  # it maps pixels
        weights["patch_embed.proj.weight"] = kernel.reshape(-1, p, p, 3).permute(0, 3, 1, 2)
        if is_main():
            say_once(f"transformers:{name} keeps the shape of images, here they become squares of "
                     f"{side} px")  # fmt: skip
    return timm_vit(PLAIN_VIT[eps], args, _joined(weights), projection, facts)


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as timm keeps them: together, but apart in attention pooling."""
    out = dict(weights)
    for key, value in weights.items():
        if ".q_proj." in key:
            parts = [out.pop(key.replace(".q_", f".{part}_")) for part in "qkv"]
            out[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".in_proj." in key:
            query, rest = out.pop(key).tensor_split([len(value) // 3])
            out[key.replace("in_proj", "q")] = query
            out[key.replace("in_proj", "kv")] = rest
    return out


def _segformer(name: str, config: Any) -> VisionTower:
    """SegFormer's encoder, MiT (Xie et al., arXiv:2105.15203); the mean of its last map."""
    net = _pretrained(SegformerModel, name, config)
    args = net.config.to_diff_dict()
    for key in ("model_type", "transformers_version", "dtype"):
        args.pop(key, None)
    mean, std, size = _pixels(name, IMAGENET, 224)
    tower = TowerConfig("segformer", args, size, (), mean, std, library="transformers")
    return VisionTower(net.eval(), tower)


def _pretrained(cls: Any, name: str, config: Any) -> Any:
    """The model of `cls` in a checkpoint that may hold more; `UsageError` where weights lack."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a checkpoint may hold more than the image part
    try:
        with no_progress_bars():
            net, info = cls.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot load image tower transformers:{name}: {first_line(error)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UsageError(f"transformers:{name} lacks weights of {cls.__name__}: {first}")
    return net


def _pixels(name: str, default: tuple[Any, Any], side: int) -> tuple[Any, Any, int]:
    """(mean, std, image side) of the folder's preprocessor, of a NaFlex one the side of a square of
    all its patches; the defaults where there is none."""
    what = f"the image processor of transformers:{name}"
    try:
        if not get_image_processor_config(name):  # no such file
            return *default, side
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if hasattr(processor, "max_num_patches"):
            side = isqrt(processor.max_num_patches) * int(processor.patch_size)
        else:
            side = int(max(dict(processor.size).values()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{what} cannot be read: {first_line(error)}") from error
    wanted = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    for key, value in wanted.items():
        theirs = getattr(processor, key, value)
        if theirs is None or abs(theirs - value) > 1e-6:
            raise UsageError(f"{what} has {key} {theirs}; allowed: {value}")
    resample = getattr(processor, "resample", None)
    if resample not in (None, Image.Resampling.BICUBIC) and is_main():
        theirs = Image.Resampling(resample).name.lower()
        print(f"transformers:{name} resizes images by {theirs}, here bicubic", file=sys.stderr)
    mean = three_numbers(processor.image_mean, f"image_mean of {what}")
    return mean, three_numbers(processor.image_std, f"image_std of {what}"), side
