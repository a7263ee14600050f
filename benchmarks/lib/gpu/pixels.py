"""The image tower: images/s by patch size, mixed shapes, timm's plain ViT."""

from pathlib import Path
from typing import Any

import timm
import torch

from contrastive.image_features import full_batch
from contrastive.model.shaped import shaped_features
from lib.gpu.data import image_tower, text_folder
from lib.gpu.results import Measured
from lib.gpu.scale import DEVICE, DTYPE, Scale
from lib.harness import Target, interleave
from lib.lit_setup import build_model
from lib.mixed_shapes import draw_requests, grouped, num_patches, squares
from retrieval.evaluation.costs import measure_costs


def by_patch_size(scale: Scale, folder: Path) -> Measured:
    """The table of an evaluation's report."""
    text = text_folder(scale.minilm, scale.vocabulary, folder / f"bert{scale.minilm.width}")
    model = build_model(image_tower(scale), text).eval()
    costs = measure_costs(model, scale.patch_sizes, 2 if scale.tiny else None)
    speed = {cost.patch_size: cost.images_per_second[0] for cost in costs}
    rows = {
        str(cost.patch_size): {
            "tokens": cost.tokens,
            "gflops": cost.gflops,
            "images_per_s": cost.images_per_second,
        }
        for cost in costs
    }
    ratio = speed[48] / speed[16]
    return {"patch_sizes": rows}, [Target("images/s at patch 48 over patch 16", ">= 6", ratio)]


def against_timm(scale: Scale, folder: Path) -> Measured:
    """The locked forward and timm's plain ViT of equal weights or at least equal tokens."""
    tower = image_tower(scale)
    figures: dict[str, Any] = {}
    targets = []
    for size in (16, 30):
        args = dict(scale.vision_args) | {"patch_size": size, "num_classes": 0}
        plain: Any = timm.create_model(scale.vision, **args)
        plain = plain.to(DEVICE, DTYPE).eval().requires_grad_(False)
        count = 2 if scale.tiny else full_batch(tower.num_tokens(size), DEVICE)
        side = scale.image_size
        images = torch.randn(count, 3, side, side, device=DEVICE, dtype=DTYPE)
        with torch.inference_mode():
            fns = {
                "flexible": lambda size=size, images=images: tower(images, size),
                "timm": lambda plain=plain, images=images: plain(images),
            }
            timings = interleave(fns, 4 * scale.rounds)
        ratio = timings.ratio("timm", "flexible")
        figures[f"patch {size}"] = {
            "images": count,
            "images_per_s": count / timings.median("flexible"),
            "timm_over_flexible": ratio,
            **timings.figures(),
        }
        targets.append(Target(f"timm's time over the locked tower's, patch {size}", ">= 1", ratio))
    return figures, targets


def packed(scale: Scale, folder: Path) -> Measured:
    """Patches per second of four aspect ratios and five budgets over those of one shape."""
    tower = image_tower(scale)
    with torch.inference_mode():
        mixed = draw_requests(tower, 20 if scale.tiny else 256)
        sets = {"one shape": squares(tower, mixed), "packed": mixed, "grouped": mixed}
        # pixels are there before the clock starts, as in the other parts
        sets = {
            name: [image._replace(pixels=image.pixels.to(DEVICE, DTYPE)) for image in images]
            for name, images in sets.items()
        }
        fns = {
            "one shape": lambda: shaped_features(tower, sets["one shape"]),
            "packed": lambda: shaped_features(tower, sets["packed"]),
            "grouped": lambda: grouped(tower, sets["grouped"]),
        }
        timings = interleave(fns, 2 * scale.rounds)
    patches = {name: sum(map(num_patches, images)) for name, images in sets.items()}
    rates = {name: patches[name] / timings.median(name) for name in sets}
    ratio = rates["packed"] / rates["one shape"]
    figures = {"patches": patches, "patches_per_s": rates, **timings.figures()}
    return figures, [Target("patches/s of mixed shapes over one shape", ">= 0.9", ratio)]
