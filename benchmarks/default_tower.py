"""The offline default tower before and after flexify, DINOv2 ViT-S/14, at every patch size.

    python benchmarks/default_tower.py [--tower dinov2s-flexi]

Queries: drawings of the concepts whose groups are held out, in all four styles; none of them was
among flexify's images. Gallery: all drawings but the query itself. A query is right if its
nearest neighbour (cosine of centred features) has its Unicode subgroup. Gains are paired; their 95%
intervals come from a bootstrap over groups of concepts. Features are kept in runs/benchmarks.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from contrastive import VisionTower, distributed, load_vision_tower
from contrastive.image_features import fill_cache
from contrastive.recipes import default_data
from contrastive.vision.earlier import keep_cached_transform
from data.config import DataConfig
from data.emoji.build import build_emoji
from data.emoji.concepts import group_of
from data.pipeline.reader import ShardReader
from data.shards.names import expand_shards
from lib.harness import Target, finish
from lib.paired import mean_interval
from lib.subgroups import SCRATCH, subgroup_shards

SIZES = (56, 32, 28, 16, 14)


def held_out_codes() -> set[str]:
    """Code points of the concepts that flexify never saw."""
    folder = build_emoji(default_data()) / "heldout_captions"
    codes = set()
    for file in folder.glob("*.tar"):
        with tarfile.open(file) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
        codes |= {name.partition("-")[2].removesuffix(".png") for name in names}
    return codes


class Gallery:
    """All drawings: keys, subgroups, and which of them are queries."""

    def __init__(self) -> None:
        folder, _ = subgroup_shards(224)
        self.shards = tuple(expand_shards([f"{folder}/*/*.tar"]))
        batches = list(ShardReader(self.shards, None, batch_size=10_000, num_workers=0))
        self.keys = [key for batch in batches for key in batch.keys]
        self.labels = np.concatenate([batch.labels.numpy() for batch in batches])
        self.places = [(np.full(len(b), b.shard), b.indices.numpy()) for b in batches]
        codes = [key.partition("-")[2] for key in self.keys]
        unseen = held_out_codes()
        self.queries = np.array([row for row, code in enumerate(codes) if code in unseen])
        groups = [group_of(codes[row]) for row in self.queries]
        self.groups = np.unique(groups, return_inverse=True)[1]

    def right(self, features: Float[torch.Tensor, "n d"]) -> Int[np.ndarray, " q"]:
        """Whether each query's nearest neighbour has its subgroup."""
        rows = torch.from_numpy(self.queries)
        unit = F.normalize(features - features.mean(0), dim=-1)
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity.argmax(1).numpy()
        return (self.labels[nearest] == self.labels[self.queries]).astype(np.int64)

    def measure(self, tower: VisionTower, name: str) -> dict[int, Int[np.ndarray, " q"]]:
        """`right` at every patch size."""
        cfg = DataConfig(shards=self.shards, features=str(SCRATCH / "default_tower" / name))
        keep_cached_transform(tower, cfg.features)
        cache = fill_cache(tower, cfg, SIZES)
        found = {}
        for size in SIZES:
            parts = [cache.lookup(*place, size)[0] for place in self.places]
            found[size] = self.right(torch.from_numpy(np.concatenate(parts)))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", default="dinov2s-flexi", help="as load_vision_tower takes it")
    args = parser.parse_args()

    gallery = Gallery()
    dtype = distributed.resolve_dtype("fastest")
    towers = {"before": "dinov2s", "after": args.tower}
    right = {}
    for name, spec in towers.items():
        tower = load_vision_tower(spec, dtype=dtype).to(distributed.device())
        right[name] = gallery.measure(tower, f"{name}-{tower.fingerprint[:8]}")
    table, targets = {}, []
    for size in SIZES:
        before, after = right["before"][size], right["after"][size]
        low, high = mean_interval(after - before, gallery.groups)
        table[size] = {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gain": float((after - before).mean()),
            "interval_95": [low, high],
        }
        print(size, table[size], flush=True)
        if size in (56, 32):
            what = f"gain at patch {size}, lower end of its 95% interval"
            targets.append(Target(what, ">= 0.0", low))
        elif size in (28, 14):  # a loss is up to 0.01, or within what the draw of concepts explains
            what = f"gain at patch {size}, upper end of its 95% interval"
            targets.append(Target(what, ">= -0.01", high))
    figures = {
        "towers": towers,
        "dtype": str(dtype),
        "queries": len(gallery.queries),
        "query_groups": int(gallery.groups.max()) + 1,
        "gallery": len(gallery.keys),
        "subgroups": len(set(gallery.labels.tolist())),
        "accuracy": table,
    }
    finish("default_tower", figures, targets, lambda file: _plot(file, table))


def _plot(file: Path, table: dict) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, style in (("before", "--"), ("after", "-")):
        axes.plot(range(len(SIZES)), [table[s][name] for s in SIZES], f"o{style}", label=name)
    axes.set_xticks(range(len(SIZES)), map(str, SIZES))
    axes.set(xlabel="patch size (pixels, of 224)", ylabel="1-nearest-neighbour accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
