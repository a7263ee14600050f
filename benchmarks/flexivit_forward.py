"""The locked flexible forward against timm's plain ViT, at equal token count.

    python benchmarks/flexivit_forward.py

FlexiViT-S at 240 px. At patch 16 its stored kernel meets timm's own forward of the same weights; at
patch 30 a timm ViT-S that was built with 30-pixel patches. Weights are random: they do not change
the time. A ratio is timm's median time over ours; 1 means the flexibility is free.
"""

import argparse
from typing import Any

import timm
import torch
from torch import Tensor

from contrastive import VisionTower
from contrastive.vision.tower_config import TowerConfig
from lib.harness import Target, finish, interleave

NAME = "flexivit_small"
IMAGE_SIZE = 240  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=101, help="timed rounds per patch size")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = timm.create_model(NAME, pretrained=False)
    config = TowerConfig(NAME, {"num_classes": net.num_classes}, image_size=IMAGE_SIZE)
    tower = VisionTower(net, config).to(device).lock()
    figures, targets = {}, []
    for patch_size in (16, 30):
        plain: Any = timm.create_model(NAME, pretrained=False, patch_size=patch_size)
        plain = plain.to(device).eval().requires_grad_(False)
        if patch_size == 16:
            plain.load_state_dict(net.state_dict())
        batch_size = {16: 4, 30: 12}[patch_size] * (32 if device.type == "cuda" else 1)
        images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        tokens = plain.patch_embed.num_patches + plain.num_prefix_tokens
        assert tokens == tower.num_tokens(patch_size)

        def ours(images: Tensor = images, patch_size: int = patch_size) -> Tensor:
            with torch.inference_mode():
                return tower(images, patch_size)

        def theirs(images: Tensor = images, plain: Any = plain) -> Tensor:
            with torch.inference_mode():
                return plain.forward_head(plain.forward_features(images), pre_logits=True)

        if patch_size == 16:  # the same function, not only the same shapes
            torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
        timings = interleave({"flexible": ours, "timm": theirs}, args.repeats)
        rounds = sorted(timings.round_ratios("timm", "flexible"))
        ratio = timings.ratio("timm", "flexible")
        figures[f"patch_{patch_size}"] = {
            "tokens": tokens,
            "batch_size": batch_size,
            **timings.figures(),
            "timm_over_flexible": ratio,
            "timm_over_flexible_rounds": [round(r, 4) for r in rounds],
            "images_per_s": batch_size / timings.median("flexible"),
        }
        what = f"timm's time / flexible time, patch {patch_size}"
        targets.append(Target(what, ">= 0.97", ratio))
    finish("flexivit_forward", figures, targets)


if __name__ == "__main__":
    main()
