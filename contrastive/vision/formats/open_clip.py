"""The image tower of an open_clip model.

CLIP's and SigLIP's ViTs become timm's, so that they are flexible, trainable and exportable; what
timm cannot express runs as open_clip's own network, at its one patch size. The projection to the
joint space of images and texts is part of the tower: with the checkpoint's text tower, it gives the
checkpoint's cosines.
"""

import sys
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg

from contrastive.distributed import is_main
from contrastive.files.open_clip import OUR_RESIZING, OpenClipCheckpoint, read_open_clip
from contrastive.files.weights import load_weights
from contrastive.vision.build import build_net
from contrastive.vision.formats.timm_vit import PLAIN_VIT, rename_keys, timm_vit
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError
from data.transform import Fit


def load_open_clip(rest: str) -> VisionTower:
    """`ARCHITECTURE@FILE` or `local-dir:FOLDER`: the image tower of an open_clip model.

    Flexible: open_clip's own ViTs, and timm trunks that are so themselves.
    """
    return open_clip_tower(read_open_clip(rest), rest)


def open_clip_tower(checkpoint: OpenClipCheckpoint, rest: str) -> VisionTower:
    """The same of what `read_open_clip(rest)` read."""
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
    fit: Fit = "squash" if checkpoint.resizing[0] == "squash" else "crop"
    if checkpoint.resizing != (OUR_RESIZING[fit], "bicubic") and is_main():
        theirs, ours = " ".join(map(str, checkpoint.resizing)), f"{OUR_RESIZING[fit]} bicubic"
        print(f"open_clip:{rest} resizes images by {theirs}, here {ours}", file=sys.stderr)
    side = cfg.image_size if isinstance(cfg.image_size, int) else max(cfg.image_size)
    if isinstance(cfg.image_size, list | tuple) and len(set(cfg.image_size)) > 1:
        raise UsageError(f"open_clip:{rest} reads {cfg.image_size} pixels; only squares are read")
    load_weights(visual, checkpoint.part("visual"), f"open_clip:{rest}")
    facts: dict[str, Any] = {"image_size": side, "mean": checkpoint.mean, "std": checkpoint.std}
    facts["fit"] = fit
    tower = _timm_trunk(visual, cfg, facts) if cfg.timm_model_name else None
    if tower is None and isinstance(visual, open_clip.transformer.VisionTransformer):
        tower = _own_vit(visual, cfg, args, facts)
    if tower is None:
        config = TowerConfig(checkpoint.name, args, library="open_clip", **facts)
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
    divides = not tower.flexible or tower.image_size % tower.native_patch_size == 0
    return tower if divides else tower.offer_own_size(alone=False)


def _rebuilds(config: TowerConfig, net: Any) -> bool:
    """Whether `config` gives a network of the same parameters."""
    with torch.device("meta"):
        try:
            again = build_net(config.library, config.name, config.args)
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
    weights = rename_keys(visual.state_dict(), OPEN_CLIP_NAMES)
    projection = weights.pop("proj").T
    return timm_vit(name, timm_args, weights, projection, facts)
