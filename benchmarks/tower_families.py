"""Families of image towers: which are flexible, at which patch sizes, and what each costs.

    python benchmarks/tower_families.py             # measures, writes JSON and a table
    python benchmarks/tower_families.py --table     # the table of docs/towers.md; measures nothing

The smallest common published architecture of each family at its own image size, float32, random
weights: they do not change the time. Images per second are medians of rounds in turn.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from lib.harness import RESULTS, finish, interleave

IMAGENET_SIZE = 224  # pixels
SECONDS_PER_FORWARD = 0.5  # at most, about: the batch is halved until a forward takes less


def _timm(name: str, image_size: int = IMAGENET_SIZE, **args: Any) -> TowerConfig:
    return TowerConfig(name, {"num_classes": 0, **args}, image_size)


# family -> (how it is loaded, its smallest common architecture)
FAMILIES: dict[str, tuple[str, TowerConfig]] = {
    "ViT, AugReg ViT": ("timm:NAME", _timm("vit_small_patch16_224")),
    "DeiT, distilled": ("timm:NAME", _timm("deit_small_distilled_patch16_224")),
    "CaiT": ("timm:NAME", _timm("cait_xxs24_224")),
    "EVA-02": ("timm:NAME", _timm("eva02_tiny_patch14_224")),
    "DINOv2": ("timm:NAME", _timm("vit_small_patch14_dinov2", 518)),
    "DINOv2 with registers": ("timm:NAME", _timm("vit_small_patch14_reg4_dinov2", 518)),
    "SigLIP": ("timm:NAME", _timm("vit_base_patch16_siglip_224")),
    "NaFlexViT": ("timm:NAME", _timm("naflexvit_base_patch16_gap", 384)),
    "CLIP": ("transformers:FOLDER", TowerConfig("vit_base_patch16_clip_224",
        {"num_classes": 0, "patch_size": 32, "act_layer": "quick_gelu"}, projection=512)),
    "SigLIP of transformers": ("transformers:FOLDER", TowerConfig("vit_base_patch16_224",
        {"num_classes": 0, "class_token": False, "global_pool": "map", "fc_norm": False,
         "act_layer": "gelu_tanh"})),
    "CLIP of open_clip": ("open_clip:ARCHITECTURE@FILE", TowerConfig("vit_base_patch16_clip_224",
        {"num_classes": 0, "patch_size": 32}, projection=512)),
    "MViTv2": ("timm:NAME", _timm("mvitv2_tiny")),
    "XCiT": ("timm:NAME", _timm("xcit_nano_12_p16_224")),
    "MLP-Mixer": ("timm:NAME", _timm("mixer_b32_224")),
    "ConvMixer": ("timm:NAME", _timm("convmixer_768_32")),
    "ResNet": ("timm:NAME", _timm("resnet50")),
    "ConvNeXt": ("timm:NAME", _timm("convnext_nano")),
    "Swin": ("timm:NAME", _timm("swin_tiny_patch4_window7_224")),
    "SegFormer's encoder (MiT)": ("transformers:FOLDER",
        TowerConfig("segformer", {}, library="transformers")),
    "CCT": ("vit_pytorch:NAME@FILE", TowerConfig("cct_14",
        {"img_size": 224, "n_conv_layers": 2, "kernel_size": 7, "num_classes": 1},
        library="vit_pytorch")),
}  # fmt: skip


def family_table() -> str:
    """Markdown: what each family's smallest architecture says of itself; no weights are made."""
    lines = ["| family | `load_vision_tower(...)` | patch sizes |", "|---|---|---|"]
    for name, (spec, config) in FAMILIES.items():
        # vit-pytorch cannot build without memory
        with torch.device("cpu" if config.library == "vit_pytorch" else "meta"):
            tower = build_vision_tower(config)
        lines.append(f"| {name} | `{spec}` | {_offer(tower)} |")
    return "\n".join(lines) + "\n"


def _offer(tower: VisionTower) -> str:
    sizes = ", ".join(map(str, tower.patch_sizes))
    return f"any: {sizes} at {tower.image_size} px" if tower.flexible else f"{sizes} alone"


def measure(config: TowerConfig, rounds: int, num_sizes: int) -> dict[str, Any]:
    """Facts and images per second of one tower, at `num_sizes` patch sizes or fewer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tower = build_vision_tower(config).to(device).lock()
    sizes = _spread(tower, num_sizes)
    forwards: dict[str, Any] = {}
    batches: dict[int, int] = {}
    for size in sizes:
        batches[size] = _batch_size(tower, size, device)
        images = torch.randn(batches[size], 3, tower.image_size, tower.image_size, device=device)

        @torch.inference_mode()
        def forward(images: torch.Tensor = images, size: int = size) -> torch.Tensor:
            return tower(images, size)

        forwards[str(size)] = forward
    timings = interleave(forwards, rounds, warmup=1)
    return {
        "architecture": config.name,
        "library": config.library,
        "flexible": tower.flexible,
        "image_size": tower.image_size,
        "patch_sizes": list(tower.patch_sizes),
        "parameters": sum(p.numel() for p in tower.parameters()),
        "width": tower.embed_dim,
        "images_per_s": {s: batches[s] / timings.median(str(s)) for s in sizes},
        "gflops": {s: tower.gflops(s) for s in sizes},
        **timings.figures(),
    }


def _spread(tower: VisionTower, num_sizes: int) -> Sequence[int]:
    """The tower's own patch size, and coarser ones, each about sqrt(2) of the one before."""
    chosen = [tower.native_patch_size if tower.flexible else tower.patch_sizes[0]]
    for size in sorted(tower.patch_sizes):
        if size >= 1.4 * chosen[-1] and len(chosen) < num_sizes:
            chosen.append(size)
    return chosen[::-1]


def _batch_size(tower: VisionTower, patch_size: int, device: torch.device) -> int:
    """About as many images as a forward of SECONDS_PER_FORWARD reads; on a GPU 256."""
    if device.type == "cuda":
        return 256
    image = torch.randn(1, 3, tower.image_size, tower.image_size)
    with torch.inference_mode():
        seconds = interleave({"one": lambda: tower(image, patch_size)}, 1, warmup=1).median("one")
    return max(1, min(16, int(SECONDS_PER_FORWARD / seconds)))


def markdown(figures: dict[str, Any]) -> str:
    """The measured table."""
    lines = [
        "| family | architecture | flexible | parameters, M | width | image | images/s by patch |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for name, f in figures.items():
        speeds = ", ".join(f"{size}: {_round(n)}" for size, n in f["images_per_s"].items())
        lines.append(
            f"| {name} | {f['architecture']} | {'yes' if f['flexible'] else 'no'} | "
            f"{f['parameters'] / 1e6:.1f} | {f['width']} | {f['image_size']} | {speeds} |"
        )
    return "\n".join(lines) + "\n"


def _round(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of docs/towers.md")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per family")
    parser.add_argument("--sizes", type=int, default=3, help="patch sizes of a flexible tower")
    args = parser.parse_args()
    if args.table:
        print(family_table(), end="")
        return
    figures = {}
    for name in args.families:
        figures[name] = measure(FAMILIES[name][1], args.rounds, args.sizes)
        print(markdown({name: figures[name]}).splitlines()[-1], flush=True)
    packages = ("torch", "timm", "transformers", "vit-pytorch")
    (RESULTS / "tower_families.md").write_text(markdown(figures))
    finish("tower_families", figures, [], packages=packages)


if __name__ == "__main__":
    main()
