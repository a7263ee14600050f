"""Image towers out of checkpoints of transformers and of vit-pytorch."""

from typing import Any

import open_clip
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SegformerModel,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import logging as transformers_logging

from contrastive.files.weights import existing_file, load_weights, read_weights, three_numbers
from contrastive.vision.flexible_families import build_net
from contrastive.vision.open_clip import PLAIN_VIT, as_timm, renamed
from contrastive.vision.tower import TowerConfig, VisionTower
from data.errors import UsageError

# ---- transformers --------------------------------------------------------------------------

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
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def load_transformers(name: str) -> VisionTower:
    """A folder or hub name: the image part of a CLIP or SigLIP checkpoint, or SegFormer's encoder.

    safetensors only. Without a preprocessor's file, pixels are normalised as its family's are.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load image tower transformers:{name}: {reason}") from error
    kind = config.model_type
    if kind == "segformer":
        return _segformer(name, config)
    if kind not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
        raise UsageError(
            f"transformers:{name} is of type {kind}; allowed: clip, siglip, their vision models, "
            "segformer"
        )
    vision = getattr(config, "vision_config", config)
    clip, projected = kind.startswith("clip"), False
    cls: Any = SiglipVisionModel
    if clip:
        projected = "CLIPVisionModel" not in (config.architectures or ())
        cls = CLIPVisionModelWithProjection if projected else CLIPVisionModel
        vision.projection_dim = config.projection_dim
    net = _pretrained(cls, name, vision)
    eps, activation = vision.layer_norm_eps, vision.hidden_act
    if eps not in PLAIN_VIT or activation not in ACTIVATIONS or not getattr(net, "use_head", True):
        raise UsageError(
            f"transformers:{name} has layer_norm_eps {eps}, hidden_act {activation}; allowed: "
            f"{', '.join(map(str, PLAIN_VIT))}; {', '.join(ACTIVATIONS)}; for SigLIP a pooling head"
        )
    args = {
        "img_size": vision.image_size,
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
    weights = renamed(net.state_dict(), TRANSFORMERS_NAMES)
    projection = weights.pop("visual_projection.weight", None)
    mean, std, _ = _pixels(name, OPENAI if clip else HALF)
    facts = {"image_size": vision.image_size, "mean": mean, "std": std}
    return as_timm(PLAIN_VIT[eps], args, _joined(weights), projection, facts)


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
    mean, std, size = _pixels(name, IMAGENET)
    tower = TowerConfig("segformer", args, size, (), mean, std, library="transformers")
    return VisionTower(net.eval(), tower)


def _pretrained(cls: Any, name: str, config: Any) -> Any:
    """The model of `cls` in a checkpoint that may hold more; `UsageError` where it lacks any."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what the checkpoint has besides is no mistake
    transformers_logging.disable_progress_bar()
    try:
        net, info = cls.from_pretrained(
            name, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load image tower transformers:{name}: {reason}") from error
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UsageError(f"transformers:{name} lacks weights of {cls.__name__}: {first}")
    return net


def _pixels(name: str, default: tuple[Any, Any]) -> tuple[Any, Any, int]:
    """(mean, std, image side) of the folder's preprocessor; the side is 224 unless it says."""
    what = f"the image processor of transformers:{name}"
    try:
        if not get_image_processor_config(name):  # no such file
            return *default, 224
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        side = int(max(dict(processor.size).values()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{what} cannot be read: {reason}") from error
    wanted = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    for key, value in wanted.items():
        theirs = getattr(processor, key, value)
        if theirs is None or abs(theirs - value) > 1e-6:
            raise UsageError(f"{what} has {key} {theirs}; allowed: {value}")
    mean = three_numbers(processor.image_mean, f"image_mean of {what}")
    return mean, three_numbers(processor.image_std, f"image_std of {what}"), side


# ---- vit-pytorch ---------------------------------------------------------------------------


def load_vit_pytorch(rest: str) -> VisionTower:
    """`NAME@FILE`: a Compact Convolutional Transformer (Hassani et al., arXiv:2104.05704).

    NAME is one of vit-pytorch's `cct_*`; its convolutions and image size are read from the file,
    which holds a state dict. Pixels are normalised as ImageNet's.
    """
    name, _, file = rest.partition("@")
    known = ("cct_2", "cct_4", "cct_6", "cct_7", "cct_8", "cct_14", "cct_16")
    if name not in known or not file:
        raise UsageError(
            f"image tower vit_pytorch:{rest}; allowed: vit_pytorch:NAME@FILE with NAME one of "
            f"{', '.join(known)}"
        )
    weights = read_weights(existing_file(file))
    weights = {k: w for k, w in weights.items() if not k.startswith("classifier.fc.")}
    kernels = [w for k, w in weights.items() if k.startswith("tokenizer.conv_layers.")]
    places = weights.get("classifier.positional_emb")
    if not kernels or places is None:
        raise UsageError(f"{file} holds the weights of another model: no {name} with positions")
    args = {"n_conv_layers": len(kernels), "kernel_size": kernels[0].shape[-1], "num_classes": 1}
    net = build_net("vit_pytorch", name, {**args, "img_size": 64})
    stride = VisionTower(net, TowerConfig(name)).native_patch_size
    args["img_size"] = round(places.shape[1] ** 0.5) * stride
    config = TowerConfig(name, args, args["img_size"], (), *IMAGENET, library="vit_pytorch")
    tower = VisionTower(build_net("vit_pytorch", name, args), config)
    load_weights(tower.net, weights, file)
    return tower
