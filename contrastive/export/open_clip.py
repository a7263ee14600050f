"""A model at one patch size as open_clip reads it: `local-dir:FOLDER`.

A class-token ViT becomes open_clip's own; what that cannot express stays a timm trunk, at the one
patch size that timm publishes it with. The mean of the features goes into the bias of the last norm
or of the projection; whitening and a linear head become the projection.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from contrastive.export.projection import image_projection, text_projection
from contrastive.export.timm import timm_net
from contrastive.files.open_clip import OUR_RESIZING
from contrastive.model.lit import LitModel
from contrastive.text.open_clip import OpenClipTextTower
from contrastive.text.open_clip_hf import OpenClipHFTextTower
from contrastive.text.transformers import HFTextTower
from data.errors import UsageError

HF_TYPES = ("bert", "roberta", "xlm-roberta")  # of which open_clip finds width and layers
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
QUICK = "QuickGELU"
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "GELU": {},
    "GELUTanh": {"act_kwargs": {"approximate": "tanh"}},
    QUICK: {},  # of both towers, or of none
}
BLOCK = {
    "norm1": "ln_1",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "ls1": "ls_1",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "ls2": "ls_2",
}

USAGE = """```python
net, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")
```

open_clip looks for the configuration of a transformers text tower where `hf_model_name` in
open_clip_config.json says, a path or hub name. When the folder has moved, in it:

    sed -i "s|\\"hf_\\(.*\\)_name\\": .*,|\\"hf_\\1_name\\": \\"$PWD\\",|" open_clip_config.json"""

Part = tuple[dict[str, Any], dict[str, Tensor]]
"""open_clip's configuration of a tower, and its weights by open_clip's names."""


def write_open_clip(model: LitModel, patch_size: int, folder: Path, home: Path) -> None:
    """Write weights, tokenizer and open_clip_config.json into `folder`, later renamed to `home`."""
    vision, weights = _vision(model, patch_size)
    text, text_weights = _text(model, home)
    weights |= text_weights
    weights["logit_scale"] = model.text.scale().log()
    config: dict[str, Any] = {"embed_dim": model.embed_dim, "custom_text": True}
    if model.text.loss.kind == "sigmoid":
        weights["logit_bias"] = model.text.logit_bias[0]
        config["init_logit_bias"] = float(model.text.logit_bias)
    if _is_quick(model):
        config["quick_gelu"] = True
    config |= {"vision_cfg": vision, "text_cfg": text}
    preprocess = {
        "mean": model.vision.mean,
        "std": model.vision.std,
        "interpolation": "bicubic",
        "resize_mode": OUR_RESIZING[model.transform.fit],
    }
    tower = model.text.encoder.tower
    tower.save_tokenizer(folder)
    if isinstance(tower, HFTextTower):
        tower.net.config.save_pretrained(folder)
    save_file(
        {k: v.detach().float().contiguous().clone() for k, v in weights.items()},
        folder / "open_clip_model.safetensors",
        metadata={"format": "pt"},
    )
    facts = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def read_open_clip(model: LitModel, folder: Path) -> tuple[Any, Any]:
    """(encode_image, encode_text) of the folder, as open_clip loads it."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    written = config["model_cfg"]["text_cfg"]
    # it names the folder as it will be called, and is not yet
    text = {**written, "hf_model_name": str(folder)} if "hf_model_name" in written else written
    net = open_clip.create_model(f"local-dir:{folder}", text_cfg=text).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return net.encode_image, lambda texts: net.encode_text(tokenizer(texts))


# ---- image tower ---------------------------------------------------------------------------


def _vision(model: LitModel, patch_size: int) -> Part:
    mean, projection = image_projection(model, "open_clip")
    net = timm_net(model.vision, patch_size, projected=True)
    reason = _why_not_native(net)
    if not reason:
        return _native(model, net, patch_size, mean, projection)
    name = model.vision.config.name
    published: Any = timm.create_model(name, pretrained=False, num_classes=0)
    weights = {k: v for k, v in net.state_dict().items() if k in published.state_dict()}
    shapes = {k: v.shape for k, v in published.state_dict().items()}
    if {k: v.shape for k, v in weights.items()} != shapes:
        raise UsageError(
            f"open_clip cannot express this image tower at patch size {patch_size}: {reason}; "
            f"allowed: a ViT with a class token, or {name} as timm publishes it"
        )
    config = {
        "timm_model_name": name,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": model.image_size,
    }
    out = {f"visual.trunk.{k}": v for k, v in weights.items()}
    out["visual.head.proj.weight"] = projection.T
    out["visual.head.proj.bias"] = -mean @ projection
    return config, out


def _is_quick(model: LitModel) -> bool:
    """Whether open_clip's own towers of this model have QuickGELU, which is said of both."""
    blocks: Any = getattr(model.vision.net, "blocks", ())
    image = len(blocks) > 0 and type(blocks[0].mlp.act).__name__ == QUICK
    tower = model.text.encoder.tower
    text = isinstance(tower, OpenClipTextTower) and bool(tower.model.get("quick_gelu"))
    if image != text and isinstance(tower, OpenClipTextTower):
        raise UsageError(
            f"open_clip has QuickGELU in both towers or in none; here it is in the "
            f"{'image' if image else 'text'} tower alone"
        )
    return image


def _why_not_native(net: Any) -> str:
    """What this tower has that open_clip's VisionTransformer lacks; empty if nothing."""
    blocks = getattr(net, "blocks", None)
    if not isinstance(net, timm.models.VisionTransformer) or not blocks:
        return f"{type(net).__name__} is no plain ViT"
    if net.cls_token is None or net.num_prefix_tokens != 1:
        return f"it has {net.num_prefix_tokens} prefix tokens, open_clip's ViT one"
    if net.global_pool not in ("token", "avg"):
        return f"it pools by {net.global_pool!r}"
    activation = type(blocks[0].mlp.act).__name__
    if activation not in ACTIVATIONS:
        return f"its activation is {activation}"
    known = {f"{old}.{end}" for old in BLOCK for end in ("weight", "bias", "gamma")} | set(BLOCK)
    unknown = [k for k in blocks.state_dict() if k.split(".", 1)[1] not in known] + [
        k for k in net.state_dict() if k.startswith("patch_embed.norm")
    ]
    return f"it has {unknown[0]}" if unknown else ""


def _native(
    model: LitModel,
    net: Any,
    patch_size: int,
    mean: Float[Tensor, " f"],
    projection: Float[Tensor, "f d"],
) -> Part:
    raw = net.state_dict()
    block = net.blocks[0]
    width = net.embed_dim
    last = net.fc_norm if isinstance(net.fc_norm, torch.nn.LayerNorm) else net.norm
    config = {
        "image_size": model.image_size,
        "patch_size": patch_size,
        "width": width,
        "layers": len(net.blocks),
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width,
        "ls_init_value": 1.0 if "blocks.0.ls1.gamma" in raw else None,
        "no_ln_pre": "norm_pre.weight" not in raw,
        "pool_type": "tok" if net.global_pool == "token" else "avg",
        "final_ln_after_pool": last is net.fc_norm,
        "norm_kwargs": {"eps": last.eps},
        **ACTIVATIONS[type(block.mlp.act).__name__],
    }
    # open_clip has neither the convolution's bias nor a class token without position: both are
    # expressed by the position table
    num_patches = (model.image_size // patch_size) ** 2
    table = torch.zeros(num_patches + 1, width)
    if "pos_embed" in raw:
        table[num_patches + 1 - raw["pos_embed"].shape[1] :] = raw["pos_embed"][0]
    if "patch_embed.proj.bias" in raw:
        table[1:] += raw["patch_embed.proj.bias"]
    out = {
        "class_embedding": raw["cls_token"][0, 0],
        "positional_embedding": table,
        "conv1.weight": raw["patch_embed.proj.weight"],
        "ln_post.weight": last.weight,
        "ln_post.bias": last.bias - mean,
        "proj": projection,
    }
    if not config["no_ln_pre"]:
        out |= {f"ln_pre.{end}": raw[f"norm_pre.{end}"] for end in ("weight", "bias")}
    for name, value in net.blocks.state_dict().items():
        number, rest = name.split(".", 1)
        for old, new in BLOCK.items():
            if rest == old or rest.startswith(old + "."):
                out[f"transformer.resblocks.{number}.{new}{rest.removeprefix(old)}"] = value
    for number in range(len(net.blocks)):  # a ViT without bias of queries, keys and values
        out.setdefault(f"transformer.resblocks.{number}.attn.in_proj_bias", torch.zeros(3 * width))
    return config, {f"visual.{k}": v for k, v in out.items()}


# ---- text tower ----------------------------------------------------------------------------


def _text(model: LitModel, home: Path) -> Part:
    tower, projection = model.text.encoder.tower, text_projection(model, "open_clip")
    if isinstance(tower, OpenClipTextTower):
        return _own_text(tower, projection, home)
    assert isinstance(tower, HFTextTower)
    kind = tower.net.config.model_type
    if kind not in HF_TYPES:
        raise UsageError(
            f"open_clip knows no text tower of type {kind}; allowed: {', '.join(HF_TYPES)}, or "
            "open_clip's own"
        )
    if tower.pooling not in POOLERS:
        raise UsageError(
            f"open_clip cannot pool a text tower of type {kind} by {tower.pooling!r}; allowed: "
            f"{', '.join(POOLERS)}"
        )
    config = {
        "hf_model_name": str(home.resolve()),
        "hf_tokenizer_name": str(home.resolve()),
        "hf_model_pretrained": False,  # its weights are among the others
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[tower.pooling],
        "context_length": tower.tokenizer.context_length,
    }
    out = {f"text.transformer.{k}": v for k, v in tower.net.state_dict().items()}
    if not isinstance(tower, OpenClipHFTextTower):
        return config, out | {"text.proj.weight": projection}
    config["tokenizer_kwargs"] = {"clean": tower.tokenizer.clean}
    if tower.layers is None:
        return config, out | {"text.proj.weight": projection}
    config["hf_proj_type"] = "mlp"
    out |= {f"text.proj.{name}": value for name, value in tower.head.state_dict().items()}
    out["text.proj.2.weight"] = projection @ out["text.proj.2.weight"]
    return config, out


def known_architecture(tower: OpenClipTextTower) -> str:
    """Its name, if that is one of open_clip's own."""
    name = tower.architecture
    if name not in open_clip.list_models():
        raise UsageError(
            f"text tower open_clip:{name} cannot be exported; allowed: an architecture of "
            "open_clip.list_models()"
        )
    return name


def _own_text(tower: OpenClipTextTower, projection: Tensor, home: Path) -> Part:
    """open_clip's text tower, its own projection and ours multiplied into one."""
    config = {**tower.model["text_cfg"], "context_length": tower.tokenizer.context_length}
    config |= {"proj_type": "linear", "proj_bias": False}
    if config.get("hf_tokenizer_name"):
        config["hf_tokenizer_name"] = str(home.resolve())
    out = dict(tower.net.state_dict())
    own = out.pop("text_projection", None)
    if isinstance(tower.net.text_projection, torch.nn.Linear):
        config["proj_bias"] = True
        own = out["text_projection.weight"]
        out["text_projection.weight"] = projection @ own
        out["text_projection.bias"] = projection @ out["text_projection.bias"]
    else:
        out["text_projection"] = projection.T if own is None else own @ projection.T
    return config, {f"text.{k}": v for k, v in out.items()}
