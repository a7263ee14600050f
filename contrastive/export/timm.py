"""An image tower at one patch size as a plain timm model, and as timm's folder."""

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from contrastive.vision.feature_terms import OWN
from contrastive.vision.resize import resample_patch_embed, resample_position_grid
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.files import replaced_folder


def timm_args(tower: VisionTower, patch_size: int) -> dict[str, Any]:
    """What `timm.create_model` needs beside the name."""
    sizes = {"patch_size": patch_size, "img_size": tower.image_size} if tower.flexible else {}
    return {**tower.config.args, **sizes}


@torch.no_grad()
def timm_net(tower: VisionTower, patch_size: int, projected: bool = False) -> Any:
    """A plain timm model that computes what the tower does at `patch_size` and its image size.

    projected: what it does before its projection, where it has one (see `affine`). Raises
    `UsageError` where timm has no such model.
    """
    tower.check_patch_size(patch_size)
    own, name = tower.net, tower.config.name
    of_timm = type(own).__module__.startswith("timm.")
    alone = projected or all(key.startswith("net.") for key in tower.state_dict())
    if not of_timm or not alone or (tower.flexible and not tower.is_plain_vit):
        ending = "" if projected else ", without a projection after them"
        raise UsageError(
            f"{name} cannot be exported; allowed: timm's own models, of those with flexible "
            f"patch sizes the plain ViTs{ending}"
        )
    if tower.config.features != OWN:
        raise UsageError(
            f"{name} joins the features {tower.config.features}, which no export expresses; "
            "allowed: own, or one vector of one block"
        )
    if not tower.flexible:
        return copy.deepcopy(own).float().eval()
    net: Any = timm.create_model(name, pretrained=False, **timm_args(tower, patch_size))
    weights = {k: v.float() for k, v in own.state_dict().items()}
    kernel = "patch_embed.proj.weight"
    weights[kernel] = resample_patch_embed(weights[kernel], (patch_size, patch_size))
    prefix, grid = tower.family.positions(own)
    if grid is not None:
        side = tower.image_size // patch_size
        positions = resample_position_grid(grid.float(), (side, side), tower.config.positions)
        parts = [positions] if prefix is None else [prefix.float(), positions]
        weights["pos_embed"] = torch.cat(parts, dim=1)
    net.load_state_dict(weights)
    return net.eval()


def export_timm(tower: VisionTower, patch_size: int, folder: Path) -> None:
    """Write `model.safetensors` and timm's `config.json`, which
    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    if not tower.flexible:
        raise UsageError(f"{tower.config.name} is a plain timm model; only ViTs are exported")
    tower.transform.check_square()
    net = timm_net(tower, patch_size)
    args = timm_args(tower, patch_size)
    data = {
        "input_size": (3, tower.image_size, tower.image_size),
        "mean": tower.mean,
        "std": tower.std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash" if tower.transform.fit == "squash" else "center",
    }
    source = {"tag": f"flexilit_p{patch_size}", "license": None}  # not those of timm's own weights
    with replaced_folder(folder) as part:
        save_for_hf(
            net,
            str(part),
            model_config={"pretrained_cfg": source},
            model_args=args,
            data_config=data,
            safe_serialization=True,
        )
