"""FlexiViT's claim on small data: one set of weights against a specialist per patch size.

    python benchmarks/flexivit_vs_fixed.py                          # three seeds
    python benchmarks/flexivit_vs_fixed.py --steps 20 --seeds 1     # a smoke test

The same ViT (width 128, depth 4) from the same random start, the same drawings in the same order,
the same number of steps: at a fixed coarse patch, at a fixed fine patch, and at random patches.
Each is then evaluated at every patch size on drawings by an artist it never saw (arXiv:2212.08013,
figure 1). All are trained by `flexify` on labels alone.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch

from contrastive.flexify.config import (
    DistillationConfig,
    FlexifyConfig,
    StudentConfig,
    TeacherConfig,
)
from contrastive.flexify.loop import flexify
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.vision.build import build_vision_tower
from contrastive.vision.formats.own_format import save_vision_tower
from contrastive.vision.load import load_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.config import DataConfig
from data.pipeline.reader import ShardReader
from lib.harness import Target, finish
from lib.subgroups import SCRATCH, subgroup_shards

IMAGE_SIZE = 48  # pixels
PATCH_SIZES = (24, 16, 12, 8, 6)  # grids of 2 to 8
COARSE, FINE = 16, 6
SHARED = "3,000 steps are few to share among five patch sizes; the specialist has them to itself"
ACCEPTED = {
    f"flexible - coarse, accuracy at patch {COARSE}": SHARED,
    "flexible - coarse, accuracy at patch 12": "above it, though by less than the seeds' spread",
}
CONTENDERS = {"coarse": (COARSE,), "fine": (FINE,), "flexible": PATCH_SIZES}


def random_start(seed: int, num_classes: int) -> Path:
    """A tower that was never trained; stored: a 16-pixel kernel, 8 x 8 positions."""
    folder = SCRATCH / "flexivit_vs_fixed" / f"start-{seed}"
    size = {"patch_size": 16, "img_size": 16 * 8}
    args = {"embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": num_classes, **size}
    torch.manual_seed(seed)
    config = TowerConfig("vit_tiny_patch16_224", args, IMAGE_SIZE, PATCH_SIZES)
    save_vision_tower(build_vision_tower(config), folder)
    return folder


def train(name: str, seed: int, steps: int, data: Path, start: Path) -> VisionTower:
    out = SCRATCH / "flexivit_vs_fixed"
    shutil.rmtree(out / f"{name}-{seed}", ignore_errors=True)
    cfg = FlexifyConfig(
        name=f"{name}-{seed}",
        out=str(out),
        data=DataConfig(
            shards=(f"{data}/train/*.tar",), views=1000, crop=0.5, flip=True, num_workers=1
        ),
        teacher=TeacherConfig(tower=str(start)),
        student=StudentConfig(patch_sizes=CONTENDERS[name]),
        loss=DistillationConfig(features=0.0, labels=1.0),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=min(100, steps)),
        zero=ZeroConfig(precision="fastest"),
        global_batch_size=128,
        steps=steps,
        seed=seed,
        log_every=max(1, steps // 20),
        val_samples=64,
    )
    return load_vision_tower(str(flexify(cfg) / "model"))


@torch.no_grad()
def accuracies(tower: VisionTower, data: Path) -> dict[int, float]:
    right, total = dict.fromkeys(PATCH_SIZES, 0), 0
    for batch in ShardReader([f"{data}/heldout_style/*.tar"], tower.transform, batch_size=128):
        assert batch.images is not None
        total += len(batch)
        for size in PATCH_SIZES:
            logits = tower.net.head(tower(tower.transform.normalise(batch.images), size))
            right[size] += int((logits.argmax(-1) == batch.labels).sum())
    return {size: right[size] / total for size in PATCH_SIZES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of each contender")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    data, num_classes = subgroup_shards(IMAGE_SIZE)
    runs: dict[str, list[dict[int, float]]] = {name: [] for name in CONTENDERS}
    for seed in range(args.seeds):
        start = random_start(seed, num_classes)
        for name in CONTENDERS:
            tower = train(name, seed, args.steps, data, start)
            runs[name].append(accuracies(tower, data))
            print(f"seed {seed}, {name}: " + _row(runs[name][-1]), flush=True)
    mean = {
        n: {s: float(np.mean([r[s] for r in rs])) for s in PATCH_SIZES} for n, rs in runs.items()
    }
    spread = {
        n: {s: float(np.ptp([r[s] for r in rs])) for s in PATCH_SIZES} for n, rs in runs.items()
    }
    print("patch    " + "  ".join(f"{size:5d}" for size in PATCH_SIZES))
    for name in CONTENDERS:
        print(f"{name:9s}" + _row(mean[name]))
    figures = {
        "classes": num_classes,
        "steps": args.steps,
        "seeds": args.seeds,
        "accuracy_mean": mean,
        "accuracy_spread": spread,  # largest - smallest over seeds
        "accuracy": runs,
    }
    targets = _targets(mean, spread)
    finish(
        "flexivit_vs_fixed",
        figures,
        targets,
        lambda file: _plot(file, mean, spread),
        accepted=ACCEPTED,
    )


def _targets(
    mean: dict[str, dict[int, float]], spread: dict[str, dict[int, float]]
) -> list[Target]:
    """At a specialist's own patch no more than a point, or the spread, below; above both else."""
    targets = []
    for size in PATCH_SIZES:
        for rival, own in (("coarse", COARSE), ("fine", FINE)):
            if size in (COARSE, FINE) and size != own:
                continue
            gain = mean["flexible"][size] - mean[rival][size]
            noise = max(spread["flexible"][size], spread[rival][size])
            bound = -max(0.01, noise) if size == own else noise
            what = f"flexible - {rival}, accuracy at patch {size}"
            targets.append(Target(what, f">= {bound:.4f}", gain))
    return targets


def _row(accuracy: dict[int, float]) -> str:
    return "  ".join(f"{accuracy[size]:.3f}" for size in PATCH_SIZES)


def _plot(
    file: Path, mean: dict[str, dict[int, float]], spread: dict[str, dict[int, float]]
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    labels = {
        "coarse": f"trained at {COARSE}",
        "fine": f"trained at {FINE}",
        "flexible": "flexible",
    }
    for name, label in labels.items():
        values, half = ([t[name][s] for s in PATCH_SIZES] for t in (mean, spread))
        axes.errorbar(range(len(PATCH_SIZES)), values, np.array(half) / 2, label=label, marker="o")
    axes.set_xticks(range(len(PATCH_SIZES)), map(str, PATCH_SIZES))
    axes.set(xlabel=f"patch size (pixels, of {IMAGE_SIZE})", ylabel="accuracy")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
