"""PI-resize and simpler ways to give a fixed-patch ViT another patch size without training.

    python benchmarks/pi_resize.py
    python benchmarks/pi_resize.py --images 32     # a smoke test

DINOv2 ViT-S/14 on Noto's drawings: 1-nearest-neighbour accuracy over Unicode's subgroups, every
drawing against all others. Measured twice: with an image that grows with the patch, so that the
number of tokens stays the same and only the kernel changes (arXiv:2212.08013, section 3.4), and
with an image of 224 pixels.
The kernel is resized by its pseudo-inverse (pi), bilinearly, bilinearly and rescaled by the areas'
ratio (area), or not at all: cut or padded with zeros around its middle (none).
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive import load_vision_tower
from contrastive.distributed import device, resolve_dtype
from contrastive.flexify.windows import resize_images
from contrastive.vision.resize import resample_patch_embed
from contrastive.vision.tower import VisionTower
from data.pipeline.reader import ShardReader
from lib.harness import Target, finish
from lib.subgroups import subgroup_shards

OWN, GRID = 14, 16
GROWING = (7, 10, 14, 20, 28)  # patch sizes at 16 x 16 patches: images of 112 to 448 pixels
FIXED = (56, 32, 28, 16, 14)  # patch sizes at 224 pixels


def bilinear(kernel: Tensor, size: int) -> Tensor:
    return F.interpolate(kernel, (size, size), mode="bilinear", align_corners=False)


def unresized(kernel: Tensor, size: int) -> Tensor:
    """The kernel's middle, or the kernel in the middle of zeros."""
    old = kernel.shape[-1]
    low = (size - old) // 2
    return F.pad(kernel, (low, size - old - low) * 2)


METHODS = {
    "pi": lambda kernel, size: resample_patch_embed(kernel, (size, size)),
    "bilinear": bilinear,
    "area": lambda kernel, size: bilinear(kernel, size) * (kernel.shape[-1] / size) ** 2,
    "none": unresized,
}


def with_kernel(tower: VisionTower, method: str, size: int) -> VisionTower:
    """The tower with its kernel resized to `size` for good."""
    other = copy.deepcopy(tower)
    stored = tower.net.patch_embed.proj.weight
    kernel = METHODS[method](stored.float(), size).to(stored.dtype)
    other.net.patch_embed.proj.weight = nn.Parameter(kernel, requires_grad=False)
    return other


@torch.no_grad()
def accuracy(tower: VisionTower, images: Tensor, labels: Tensor, size: int, side: int) -> float:
    """Of the nearest other drawing, by cosine of centred features."""
    resized = (resize_images(part.to(device()), (side, side)) for part in images.split(16))
    parts = [tower(part, size).cpu() for part in resized]
    features = torch.cat(parts)
    features = F.normalize(features - features.mean(0), dim=-1)
    similarity = (features @ features.T).fill_diagonal_(-torch.inf)
    return float((labels[similarity.argmax(1)] == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=700, help="drawings")
    args = parser.parse_args()

    data, _ = subgroup_shards(224)
    tower = load_vision_tower("dinov2s", dtype=resolve_dtype("fastest")).to(device())
    reader = ShardReader([f"{data}/train/noto-*.tar"], tower.transform, batch_size=100)
    batches = list(reader)
    chosen = torch.linspace(0, sum(map(len, batches)) - 1, args.images).long()
    pixels = torch.cat([b.images for b in batches if b.images is not None])[chosen]
    images = tower.transform.normalise(pixels)
    labels = torch.cat([b.labels for b in batches])[chosen]
    figures: dict = {"images": args.images, "standard_error": (0.24 / args.images) ** 0.5}
    for panel, sizes in (("same_tokens", GROWING), ("same_image", FIXED)):
        table: dict[str, dict[int, float]] = {name: {} for name in METHODS}
        for size in sizes:
            side = size * GRID if panel == "same_tokens" else 224
            for name in METHODS:
                if size == OWN and name != "pi":
                    table[name][size] = table["pi"][size]  # nothing to resize
                    continue
                resized = with_kernel(tower, name, size)
                table[name][size] = accuracy(resized, images, labels, size, side)
            print(panel, size, {n: round(table[n][size], 3) for n in METHODS}, flush=True)
        figures[panel] = table
    targets = [
        Target(
            f"pi - {name}, accuracy over other patch sizes, {panel.replace('_', ' ')}",
            ">= 0.0",
            _mean(figures[panel]["pi"]) - _mean(figures[panel][name]),
        )
        for panel in ("same_tokens", "same_image")
        for name in METHODS
        if name != "pi"
    ]
    finish("pi_resize", figures, targets, lambda file: _plot(file, figures))


def _mean(row: dict[int, float]) -> float:
    others = [value for size, value in row.items() if size != OWN]
    return sum(others) / len(others)


def _plot(file: Path, figures: dict) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    titles = {"same_tokens": "image grows with the patch", "same_image": "image of 224 pixels"}
    for axes, (panel, title) in zip(panels, titles.items(), strict=True):
        for name, row in figures[panel].items():
            sizes = sorted(row)
            axes.plot(range(len(sizes)), [row[s] for s in sizes], marker="o", label=name)
        axes.set_xticks(range(len(sizes)), map(str, sizes))
        axes.set(title=title, xlabel="patch size (pixels; the kernel is 14)")
    panels[0].set_ylabel("1-nearest-neighbour accuracy")
    panels[0].legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
