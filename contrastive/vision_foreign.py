"""Image towers out of other libraries' checkpoints: open_clip, transformers, vit-pytorch.

CLIP's and SigLIP's ViTs become timm's, so that they are flexible, can be trained and handed on as
any other; what timm cannot express is read whole. The projection to the joint space of images and
texts belongs to the tower: with the checkpoint's text tower, it gives the checkpoint's cosines.
"""

from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SegformerModel,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from contrastive.families import build_net
from contrastive.open_clip_files import read_open_clip
from contrastive.vision import TowerConfig, VisionTower
from contrastive.weights import existing_file, load_weights, read_weights
from data.errors import UsageError

PLAIN_VIT = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}  # by the norms' eps

# ---- open_clip -----------------------------------------------------------------------------


def load_open_clip(rest: str) -> VisionTower:
    """`ARCHITECTURE@FILE` or `local-dir:FOLDER`: the image tower of an open_clip model.

    Flexible: open_clip's own ViTs, and timm trunks that are so themselves.
    """
    checkpoint = read_open_clip(rest)
    try:
        cfg = CLIPVisionCfg(**checkpoint.model["vision_cfg"])
        args = {
            "embed_dim": checkpoint.model["embed_dim"],
            "vision_cfg": checkpoint.model["vision_cfg"]
            | {"output_tokens": False, "timm_model_pretrained": False},
            "quick_gelu": checkpoint.model.get("quick_gelu", False),
        }
        visual = build_net("open_clip", "", args)
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(f"open_clip:{rest} has no image tower: {error}") from error
    side = cfg.image_size if isinstance(cfg.image_size, int) else max(cfg.image_size)
    if isinstance(cfg.image_size, list | tuple) and len(set(cfg.image_size)) > 1:
        raise UsageError(f"open_clip:{rest} reads {cfg.image_size} pixels; only squares are read")
    if hasattr(visual, "trunk") and hasattr(visual.trunk, "set_input_size"):
        visual.set_input_size(side)
    load_weights(visual, checkpoint.part("visual"), f"open_clip:{rest}")
    facts: dict[str, Any] = {"image_size": side, "mean": checkpoint.mean, "std": checkpoint.std}
    tower = _timm_trunk(visual, cfg, facts) if cfg.timm_model_name else None
    if tower is None and isinstance(visual, open_clip.transformer.VisionTransformer):
        tower = _own_vit(visual, cfg, args, facts)
    if tower is None:
        config = TowerConfig(rest, args, library="open_clip", **facts)
        tower = VisionTower(visual, config)
    return tower


def _timm_trunk(visual: Any, cfg: CLIPVisionCfg, facts: dict[str, Any]) -> VisionTower | None:
    """The trunk, and the linear map after it; None for any other head."""
    head = dict(visual.head.named_children())
    if set(head) - {"drop", "proj"} or (head and head["proj"].bias is not None):
        return None
    args: dict[str, Any] = {"num_classes": visual.trunk.num_classes}
    if cfg.timm_pool:
        args["global_pool"] = cfg.timm_pool
    if visual.image_size[0] != visual.trunk.pretrained_cfg["input_size"][-1]:
        args["img_size"] = visual.image_size[0]
    assert cfg.timm_model_name
    config = TowerConfig(
        cfg.timm_model_name,
        args,
        projection=head["proj"].out_features if head else 0,
        **facts,
    )
    if args["num_classes"] or not _rebuilds(config, visual.trunk):
        return None
    tower = VisionTower(visual.trunk, config)
    if head:
        tower.projection.load_state_dict(head["proj"].state_dict())
    return tower


def _rebuilds(config: TowerConfig, net: Any) -> bool:
    """Whether `config` gives a network of the same parameters."""
    with torch.device("meta"):
        try:
            again = build_net(config.library, config.timm_name, config.timm_args)
        except UsageError:
            return False
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (again, net)]
    return shapes[0] == shapes[1]


OPEN_CLIP_NAMES = (
    ("conv1.", "patch_embed.proj."),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("ls_1.", "ls1."),
    ("ls_2.", "ls2."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)


def _own_vit(
    visual: Any, cfg: CLIPVisionCfg, args: dict[str, Any], facts: dict[str, Any]
) -> VisionTower | None:
    """As timm's ViT; None where it has what timm's lacks."""
    extra = (
        cfg.attentional_pool, cfg.block_type, cfg.qk_norm, cfg.scaled_cosine_attn, cfg.scale_heads,
        cfg.scale_attn_inner, cfg.scale_attn, cfg.scale_fc, cfg.act_kwargs, cfg.no_ln_pre,
        cfg.final_ln_after_pool,
    )  # fmt: skip
    name = PLAIN_VIT.get(visual.ln_post.eps)
    if any(extra) or name is None or cfg.pool_type not in ("tok", "avg"):
        return None
    timm_args = {
        "img_size": facts["image_size"],
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.width,
        "depth": cfg.layers,
        "num_heads": cfg.width // cfg.head_width,
        "mlp_ratio": cfg.mlp_ratio,
        "init_values": cfg.ls_init_value,
        "pre_norm": True,
        "act_layer": "quick_gelu" if args["quick_gelu"] else "gelu",
        "global_pool": "token" if cfg.pool_type == "tok" else "avg",
        "fc_norm": False,
        "num_classes": 0,
    }
    weights = _renamed(visual.state_dict(), OPEN_CLIP_NAMES)
    projection = weights.pop("proj").T
    return _as_timm(name, timm_args, weights, projection, facts)


def _renamed(weights: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    out = {}
    for key, value in weights.items():
        for old, new in names:
            key = key.replace(old, new)
        out[key] = value
    return out


def _as_timm(
    name: str,
    args: dict[str, Any],
    weights: dict[str, Tensor],
    projection: Tensor | None,
    facts: dict[str, Any],
) -> VisionTower:
    """A tower of timm's ViT with these weights, reshaped where only the shape differs."""
    config = TowerConfig(
        name, args, projection=0 if projection is None else projection.shape[0], **facts
    )
    tower = VisionTower(build_net("timm", name, args), config)
    for key, own in tower.net.state_dict().items():
        if key in weights and weights[key].numel() == own.numel():
            weights[key] = weights[key].reshape(own.shape)
    load_weights(tower.net, weights, name)
    if projection is not None:
        tower.projection.load_state_dict({"weight": projection})
    return tower


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
    weights = _renamed(net.state_dict(), TRANSFORMERS_NAMES)
    projection = weights.pop("visual_projection.weight", None)
    mean, std, _ = _pixels(name, OPENAI if clip else HALF)
    facts = {"image_size": vision.image_size, "mean": mean, "std": std}
    return _as_timm(PLAIN_VIT[eps], args, _joined(weights), projection, facts)


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
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return *default, 224
    size = dict(processor.size)
    return tuple(processor.image_mean), tuple(processor.image_std), int(max(size.values()))


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
