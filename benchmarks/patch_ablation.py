"""A text tower trained at one patch size and one trained at random ones, at every patch size.

    python benchmarks/patch_ablation.py

The demo's recipe on the default data, shorter, with several seeds. Features are cached once in
runs/ablation (about ten minutes on two cores), so that each run trains the text tower alone.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from contrastive import LitModel, VisionTower, distributed, load_vision_tower
from contrastive.image_features import FeatureSource, fill_cache
from contrastive.recipes import default_data, demo
from contrastive.train.loop import train
from contrastive.vision.earlier import keep_cached_transform
from data.config import DataConfig
from data.emoji.build import build_emoji
from data.pipeline.reader import ShardReader
from lib.harness import Target, finish
from retrieval import ZeroShotClassifier, load_dataset

OUT = Path("runs/ablation")
SETS = ("heldout_captions", "heldout_style")
SIZES = (56, 32, 28, 16, 14)
TRAINED_AT: dict[str, tuple[int, ...]] = {
    "56": (56,),
    "28": (28,),
    "16": (16,),
    "random": (56, 32, 28, 16),
}
SHARED = (
    "160 steps are shared by four patch sizes, so each is seen a quarter as often as by its "
    "specialist: within 0.04 of it, and far above it at every other patch size"
)
ACCEPTED = {
    f"{dataset}: top-1 at {size}, random minus trained at {size}": SHARED
    for dataset in SETS
    for size in (56, 16)
}


class Gallery:
    """A labelled set's features at every patch size, and its texts."""

    def __init__(self, tower: VisionTower, root: Path, sizes: tuple[int, ...]) -> None:
        self.dataset = load_dataset("shards", str(root))
        cfg = DataConfig(shards=tuple(self.dataset.shards), features=str(OUT / root.name))
        keep_cached_transform(tower, cfg.features)
        cache = fill_cache(tower, cfg, sizes)
        batches = list(ShardReader(cfg.shards, None, batch_size=10_000, num_workers=0))
        self.labels = np.concatenate([batch.labels.numpy() for batch in batches])
        self.features: dict[int, list[torch.Tensor]] = {size: [] for size in sizes}
        for batch in batches:
            shards = np.full(len(batch), batch.shard)
            for size in sizes:
                features, valid = cache.lookup(shards, batch.indices.numpy(), size)
                assert valid.all()
                self.features[size].append(torch.from_numpy(features))

    def accuracy(self, model: LitModel) -> dict[int, tuple[float, float]]:
        """Patch size -> top-1 and top-5 accuracy."""
        texts = self.dataset.class_names, self.dataset.templates
        classifier = ZeroShotClassifier(model, *texts)
        found = {}
        for size, parts in self.features.items():
            embeds = model.embed_features(torch.cat(parts)).numpy()
            hits = classifier.classify_embeddings(embeds)[0] == self.labels[:, None]
            found[size] = (float(hits[:, 0].mean()), float(hits.any(1).mean()))
        return found


def run(name: str, sizes: tuple[int, ...], seed: int, steps: int, shards: str) -> LitModel:
    """One training with the demo's recipe; done runs are read."""
    recipe = demo()
    cfg = dataclasses.replace(
        recipe,
        name=f"{name}-{seed}",
        out=str(OUT),
        data=dataclasses.replace(recipe.data, shards=(shards,), features=str(OUT / "train")),
        vision=dataclasses.replace(recipe.vision, patch_sizes=sizes),
        steps=steps,
        seed=seed,
        checkpoint_every=0,
        keep_checkpoints=1,
    )
    if not (cfg.folder / "model").exists():
        train(cfg)
        shutil.rmtree(cfg.folder / "checkpoints")
    return LitModel.from_pretrained(cfg.folder / "model")


def plot(table: dict, sizes: tuple[int, ...], file: Path) -> None:
    fig, axes = plt.subplots(1, len(SETS), figsize=(9, 3.4))
    for axis, dataset in zip(axes, SETS, strict=True):
        for name, rows in table[dataset].items():
            means = [rows[str(size)]["top1"]["mean"] for size in sizes]
            spread = [rows[str(size)]["top1"]["std"] for size in sizes]
            style = "--" if name == "random" else "-"
            axis.errorbar(
                range(len(sizes)), means, spread, marker="o", capsize=3, ls=style, label=name
            )
        axis.set_xticks(range(len(sizes)), map(str, sizes))
        axis.set_xlabel("evaluated at patch size (pixels)")
        axis.set_title(dataset.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1 accuracy")
    axes[1].legend(title="trained at", fontsize=8, frameon=False)
    fig.tight_layout()
    fig.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160, help="of 128 pairs each")
    args = parser.parse_args()

    data = build_emoji(default_data())
    shards = f"{data}/train/*.tar"
    vision = demo().vision
    tower = load_vision_tower(vision.tower, dtype=distributed.resolve_dtype(vision.dtype))
    distributed.ensure_group()
    galleries = {name: Gallery(tower, Path(data) / name, SIZES) for name in SETS}
    cfg = DataConfig(shards=(shards,), features=str(OUT / "train"))
    FeatureSource(tower, cfg, TRAINED_AT["random"])
    found: dict[str, dict[str, list]] = {dataset: {} for dataset in SETS}
    for seed in range(args.seeds):
        for name, sizes in TRAINED_AT.items():
            model = run(name, sizes, seed, args.steps, shards)
            for dataset, gallery in galleries.items():
                accuracy = gallery.accuracy(model)
                found[dataset].setdefault(name, []).append(accuracy)
                top1 = ", ".join(f"{size}: {a[0]:.3f}" for size, a in accuracy.items())
                print(f"trained at {name}, seed {seed}, {dataset}, top-1 at {top1}", flush=True)
    table = {dataset: summary(rows) for dataset, rows in found.items()}
    finish(
        "patch_ablation",
        {"seeds": args.seeds, "steps": args.steps, "accuracy": table},
        targets(table),
        plot=lambda file: plot(table, SIZES, file),
        packages=("torch", "timm", "transformers", "deepspeed"),
        accepted=ACCEPTED,
    )


def summary(rows: dict[str, list]) -> dict:
    """Mean and standard deviation over seeds, per trained-at, evaluated-at and k."""
    out: dict = {}
    for name, seeds in rows.items():
        out[name] = {}
        for size in SIZES:
            values = np.array([accuracy[size] for accuracy in seeds])
            out[name][str(size)] = {
                f"top{k}": {
                    "mean": round(float(values[:, i].mean()), 4),
                    "std": round(float(values[:, i].std(ddof=1)) if len(values) > 1 else 0.0, 4),
                }
                for i, k in enumerate((1, 5))
            }
    return out


def targets(table: dict) -> list[Target]:
    """Random patch sizes against the best specialist, at each patch size that has one."""
    found = []
    for dataset, rows in table.items():
        for size in ("56", "28", "16"):
            gain = rows["random"][size]["top1"]["mean"] - rows[size][size]["top1"]["mean"]
            spread = max(rows[n][size]["top1"]["std"] for n in ("random", size))
            what = f"{dataset}: top-1 at {size}, random minus trained at {size}"
            found.append(Target(what, f">= {-max(0.01, round(spread, 4))}", round(gain, 4)))
    return found


if __name__ == "__main__":
    main()
