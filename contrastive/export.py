"""A tower at one patch size as other people's programs read it."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from contrastive.flexi import resample_patch_embed, resample_position_grid
from contrastive.vision import VisionTower
from data.errors import UsageError


@torch.no_grad()
def timm_vit(tower: VisionTower, patch_size: int) -> Any:
    """A plain timm ViT that computes what the tower does at `patch_size` and its image size."""
    tower.check_patch_size(patch_size)
    if not tower.is_plain_vit or tower.config.projection:
        raise UsageError(
            f"{tower.config.timm_name} cannot be handed on; allowed: plain ViTs without a "
            "projection to a space of images and texts"
        )
    args = tower.config.timm_args | {"patch_size": patch_size, "img_size": tower.image_size}
    net: Any = timm.create_model(tower.config.timm_name, pretrained=False, **args)
    own, weights = tower.net, {k: v.float() for k, v in tower.net.state_dict().items()}
    kernel = "patch_embed.proj.weight"
    weights[kernel] = resample_patch_embed(weights[kernel], (patch_size, patch_size))
    if own.pos_embed is not None:
        slots = 0 if own.no_embed_class else own.num_prefix_tokens
        prefix, grid = weights["pos_embed"].split([slots, own.pos_embed.shape[1] - slots], dim=1)
        side = tower.image_size // patch_size
        positions = resample_position_grid(grid, side, tower.config.positions)
        weights["pos_embed"] = torch.cat([prefix, positions], dim=1)
    net.load_state_dict(weights)
    return net.eval()


def export_timm(tower: VisionTower, patch_size: int, folder: Path) -> None:
    """Write `model.safetensors` and timm's `config.json`: `timm.create_model("local-dir:FOLDER",
    pretrained=True)` reads them."""
    net = timm_vit(tower, patch_size)
    args = {**tower.config.timm_args, "patch_size": patch_size, "img_size": tower.image_size}
    data = {
        "input_size": (3, tower.image_size, tower.image_size),
        "mean": tower.mean,
        "std": tower.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    source = {"tag": f"flexilit_p{patch_size}", "license": None}  # not those of timm's own weights
    save_for_hf(
        net,
        str(folder),
        model_config={"pretrained_cfg": source},
        model_args=args,
        data_config=data,
        safe_serialization=True,
    )
