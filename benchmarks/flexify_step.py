"""A training step of a flexible ViT against a plain timm ViT of the same number of tokens.

    python benchmarks/flexify_step.py

FlexiViT-S at 240 px: forward, cross-entropy, backward, AdamW. The flexible one resizes its stored
32-pixel kernel and 7 x 7 positions in every step, with gradients; the plain one was built with the
patch size. A ratio is timm's median time over ours; 1 means the flexibility is free.
"""

import argparse
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive import VisionTower
from contrastive.flexify.config import DistillationConfig
from contrastive.flexify.losses import DistillationLoss, Targets, class_shares
from contrastive.run.config import OptimConfig
from contrastive.run.optim import build_optimizer
from contrastive.vision.patch_dropout import draw_kept
from contrastive.vision.tower_config import TowerConfig
from lib.harness import Target, finish, interleave

NAME, IMAGE_SIZE = "flexivit_small", 240  # pixels
STORED: dict[str, Any] = {"patch_size": 32, "img_size": 7 * 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31, help="timed rounds per case")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures, targets = {}, []
    for patch_size, keep in ((48, 1.0), (30, 1.0), (16, 1.0), (16, 0.5)):
        batch_size = {48: 16, 30: 8, 16: 3}[patch_size] * (16 if device.type == "cuda" else 1)
        torch.manual_seed(0)
        images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        labels = torch.randint(1000, (batch_size,), device=device)

        net: Any = timm.create_model(NAME, **STORED)
        config = TowerConfig(NAME, {"num_classes": net.num_classes, **STORED}, IMAGE_SIZE)
        loss = DistillationConfig(features=0.0, labels=1.0)
        student = DistillationLoss(VisionTower(net, config), loss, None).to(device).train()
        weight = torch.full((batch_size,), 1 / batch_size, device=device)
        classes = class_shares(labels, net.num_classes)
        ours_step = build_optimizer(OptimConfig(), student)

        given = Targets(weight, classes=classes, class_weight=weight)

        def ours(
            size: int = patch_size, keep: float = keep, images: Tensor = images,
            student: DistillationLoss = student, given: Targets = given,
            optimizer: torch.optim.Optimizer = ours_step,
        ) -> None:  # fmt: skip
            kept: float | Tensor = keep
            if keep < 1:
                side = IMAGE_SIZE // size
                kept = draw_kept(keep, side**2, len(images), 0, 0).to(images.device)
            optimizer.zero_grad()
            student(images, size, kept, given).backward()
            optimizer.step()

        dropped: dict[str, Any] = {"patch_drop_rate": 1 - keep} if keep < 1 else {}
        plain = timm.create_model(NAME, patch_size=patch_size, img_size=IMAGE_SIZE, **dropped)
        plain = plain.to(device).train()
        theirs_step = build_optimizer(OptimConfig(), plain)

        def theirs(
            images: Tensor = images, labels: Tensor = labels, plain: nn.Module = plain,
            optimizer: torch.optim.Optimizer = theirs_step,
        ) -> None:  # fmt: skip
            optimizer.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            optimizer.step()

        timings = interleave({"flexible": ours, "timm": theirs}, args.repeats)
        ratio = timings.ratio("timm", "flexible")
        name = f"patch_{patch_size}" + (f"_keep_{keep}" if keep < 1 else "")
        figures[name] = {
            "tokens": round(keep * (IMAGE_SIZE // patch_size) ** 2) + 1,
            "batch_size": batch_size,
            **timings.figures(),
            "timm_over_flexible": ratio,
            "timm_over_flexible_rounds": [
                round(r, 4) for r in sorted(timings.round_ratios("timm", "flexible"))
            ],
            "images_per_s": batch_size / timings.median("flexible"),
        }
        what = f"timm's step / flexible step, patch {patch_size}"
        what += f", {keep:.0%} of the patches" if keep < 1 else ""
        targets.append(Target(what, ">= 0.97", ratio))
    finish("flexify_step", figures, targets)


if __name__ == "__main__":
    main()
