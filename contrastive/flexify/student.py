"""The teacher tower, and the student that starts from it."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive import distributed
from contrastive.flexify.config import StudentConfig, TeacherConfig
from contrastive.flexify.losses import class_head
from contrastive.flexify.windows import cut_for, resize_images
from contrastive.run.trainable import train_only
from contrastive.vision.build import build_vision_tower
from contrastive.vision.feature_terms import OWN
from contrastive.vision.load import load_vision_tower
from contrastive.vision.resize import (
    default_patch_sizes,
    restored_patch_embed,
    restored_position_grid,
)
from contrastive.vision.tower import VisionTower
from data.errors import UsageError

# ---- teacher -------------------------------------------------------------------------------


class Teacher:
    """`teacher(images)`: the locked tower's features at its own patch size and image size, of
    rectangles at as many patches."""

    def __init__(self, cfg: TeacherConfig) -> None:
        dtype = distributed.resolve_dtype(cfg.dtype)
        self.tower = load_vision_tower(cfg.tower, dtype=dtype, features=cfg.features)
        self.tower.to(distributed.device())
        self.patch_size = cfg.patch_size or self.tower.own_patch_size
        self.tower.check_patch_size(self.patch_size)
        self.head = class_head(self.tower)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "b 3 h w"], student: VisionTower
    ) -> Float[Tensor, "b d"]:
        """Features of images that were normalised for `student`."""
        height, width = images.shape[-2:]
        cut = cut_for(self.tower, self.patch_size, (height, width), any_patch=False)
        images = resize_images(images, (cut.height, cut.width))
        if (self.tower.mean, self.tower.std) != (student.mean, student.std):
            theirs, ours = (
                [images.new_tensor(v).view(3, 1, 1) for v in (t.mean, t.std)]
                for t in (student, self.tower)
            )
            images = (images * theirs[1] + theirs[0] - ours[0]) / ours[1]
        return self.tower(images, self.patch_size)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        assert self.head is not None
        return self.head(features.to(self.head.weight.dtype)).float()


# ---- student -------------------------------------------------------------------------------


def build_student(cfg: StudentConfig, teacher: TeacherConfig, patch_size: int) -> VisionTower:
    """The student before its first step: float32, unlocked.

    Its output at `patch_size` stays the same, whatever the stored sizes become (unless they
    shrink). New parameters (a head, attention pooling) are drawn from torch's global generator.
    """
    spec = cfg.tower or teacher.tower
    features = OWN if cfg.tower else teacher.features
    tower = load_vision_tower(spec, locked=False, features=features)
    if not tower.is_plain_vit:
        raise UsageError(
            f"student.tower {spec}: {tower.config.name} cannot be made flexible by "
            "training; allowed are plain ViTs"
        )
    config = replace(tower.config, **_offers(cfg, tower))
    changes = _changes(cfg, tower)
    if changes:
        config = replace(config, args={**config.args, **changes})
        rebuilt = build_vision_tower(config)
        _carry_over(tower, rebuilt, patch_size)
    else:
        rebuilt = VisionTower(tower.net, config)
    rebuilt.projection.load_state_dict(tower.projection.state_dict())
    tower = rebuilt
    for size in cfg.patch_sizes or tower.patch_sizes:
        tower.check_patch_size(size)
    if cfg.trainable:
        train_only(tower, cfg.trainable, "student.trainable")
    return tower.train()


def _offers(cfg: StudentConfig, tower: VisionTower) -> dict[str, Any]:
    """Image size and the patch sizes that the saved tower lists. A start tower that offers its own
    alone, as a checkpoint does, would leave nothing to learn."""
    size = cfg.image_size or tower.image_size
    offered = tower.patch_sizes
    if size != tower.image_size or offered == (tower.native_patch_size,):
        offered = default_patch_sizes(size, tower.native_patch_size)
    if cfg.patch_sizes:
        offered = tuple(sorted(set(cfg.patch_sizes), reverse=True))
    if not offered:
        raise UsageError(
            f"student.image_size {size}: no patch size gives a grid of 4 to 30; name "
            "student.patch_sizes, or another size"
        )
    return {"image_size": size, "patch_sizes": offered}


def _changes(cfg: StudentConfig, tower: VisionTower) -> dict[str, Any]:
    """timm's arguments that differ from the tower's own."""
    net = tower.net
    changes: dict[str, Any] = {}
    if cfg.kernel_size or cfg.grid:
        kernel = cfg.kernel_size or tower.native_patch_size
        if cfg.grid and net.pos_embed is None:
            raise UsageError(f"student.grid {cfg.grid}: {tower.config.name} has no positions")
        grid = cfg.grid or round(
            (_positions(net).shape[1] if net.pos_embed is not None else 1) ** 0.5
        )
        changes |= {"patch_size": kernel, "img_size": kernel * grid}
    if cfg.pooling != "own" and cfg.pooling != net.global_pool:
        if cfg.pooling == "token" and net.cls_token is None:
            raise UsageError(
                f"student.pooling token: {tower.config.name} has no class token; "
                "allowed: own, avg, map"
            )
        changes |= {"global_pool": cfg.pooling, "fc_norm": False}
    if cfg.num_classes and tower.config.projection:
        raise UsageError(
            f"student.num_classes {cfg.num_classes}: this tower ends in a projection to a "
            "space of images and texts; allowed: 0"
        )
    if cfg.num_classes and cfg.num_classes != net.num_classes:
        changes |= {"num_classes": cfg.num_classes}
    return changes


def _positions(net: Any) -> Float[Tensor, "1 n d"]:
    """The stored grid, without the prefix tokens' slots."""
    slots = 0 if net.no_embed_class else net.num_prefix_tokens
    return net.pos_embed[:, slots:]


def _carry_over(old: VisionTower, new: VisionTower, patch_size: int) -> None:
    """Copy the old tower's weights into the new one, resized where the stored sizes differ."""
    weights = {k: v.clone() for k, v in old.net.state_dict().items()}
    shapes = {k: v.shape for k, v in new.net.state_dict().items()}
    kernel = "patch_embed.proj.weight"
    if shapes[kernel] != weights[kernel].shape:
        size = shapes[kernel][-1]
        weights[kernel] = restored_patch_embed(weights[kernel], size, patch_size)
    if "pos_embed" in weights and shapes["pos_embed"] != weights["pos_embed"].shape:
        grid = _positions(old.net).detach()
        slots = weights["pos_embed"][:, : weights["pos_embed"].shape[1] - grid.shape[1]]
        size = round(_positions(new.net).shape[1] ** 0.5)
        side = old.image_size // patch_size
        resized = restored_position_grid(grid, size, side, old.config.positions)
        weights["pos_embed"] = torch.cat([slots, resized], dim=1)
    for end in ("weight", "bias"):  # timm's norm after a mean is the norm before another pooling
        if f"fc_norm.{end}" in weights and f"norm.{end}" in shapes:
            weights[f"norm.{end}"] = weights.pop(f"fc_norm.{end}")
    fitting = {k: v for k, v in weights.items() if shapes.get(k) == v.shape}
    missing = new.net.load_state_dict(fitting, strict=False).missing_keys
    strange = [name for name in missing if name.split(".")[0] not in ("head", "attn_pool")]
    assert not strange, strange
