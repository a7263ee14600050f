"""Whether the agreement of patch sizes, which needs no labels, predicts what a size is good for.

    python benchmarks/agreement.py

384 default drawings of 24 Unicode subgroups, 16 of each, by the locked towers `dinov2s` (untouched:
trained at patch 14) and `dinov2s-flexi` (made flexible), whose features are centred. Two thirds are
indexed; `retrieval.search.neighbours` compares each coarse patch size with patch 14 by indexed
images alone. The other third are queries of their own, and give the true values: how many of patch
14's ten nearest a coarse index finds (recall@10), how many of its ten nearest have the query's
subgroup (precision@10, as a share of patch 14's), and whether the first one has (1-NN accuracy,
likewise). A sample of 96 indexed images shows what is measured where the index holds no vectors at
patch 14. The threshold below which users are warned was chosen from these figures.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

from contrastive import VisionTower, distributed, load_vision_tower
from contrastive.recipes import default_data
from data.emoji.build import build_emoji
from data.progress import Progress
from lib.harness import Target, finish
from lib.subgroups import read_drawings
from retrieval.search.agreement import MIN_NEIGHBOURS, NEAREST
from retrieval.search.neighbours import compare_vectors, overlap

OWN = 14
SIZES = (112, 56, 32, 28, 16)
TOWERS = ("dinov2s", "dinov2s-flexi")
GROUPS, EACH, ASKED = 24, 16, 5  # subgroups, drawings of each, of these queries
SAMPLE = 96
BATCH = 32


class Drawings:
    """Files of drawings, their subgroups, and which are queries."""

    def __init__(self) -> None:
        tars = sorted(build_emoji(default_data()).glob("*/*.tar"))
        drawings = [drawing for tar in tars for drawing in read_drawings(tar)]
        common = Counter(name for _, _, name in drawings).most_common(GROUPS)
        rng = np.random.default_rng(0)
        self.files: list[bytes] = []
        for group, _ in common:
            found = [file for _, file, name in drawings if name == group]
            self.files += [found[n] for n in rng.permutation(len(found))[:EACH]]
        self.labels = np.repeat(np.arange(GROUPS), EACH)
        self.is_query = np.tile(np.arange(EACH) < ASKED, GROUPS)

    @torch.no_grad()
    def features(self, tower: VisionTower) -> dict[int, Float[np.ndarray, "n d"]]:
        """Unit vectors at every patch size, centred by the indexed drawings at patch 14."""
        transform, device = tower.transform, distributed.device()
        rows: dict[int, list[torch.Tensor]] = {size: [] for size in (*SIZES, OWN)}
        for start in Progress(range(0, len(self.files), BATCH), tower.config.name):
            part = [transform.read(file, 10**8) for file in self.files[start : start + BATCH]]
            images = transform.normalise(torch.stack(part).to(device))
            for size, found in rows.items():
                found.append(tower(images, size).cpu())
        features = {size: torch.cat(found).numpy() for size, found in rows.items()}
        mean = features[OWN][~self.is_query].mean(0)
        return {size: _unit(found - mean) for size, found in features.items()}


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def truth(drawings: Drawings, vectors: dict[int, np.ndarray]) -> dict[int, dict[str, float]]:
    """Of drawings that are not indexed, per patch size."""
    asked, labels = drawings.is_query, drawings.labels
    found = {
        size: np.argsort(-(rows[asked] @ rows[~asked].T), axis=1, kind="stable")[:, :NEAREST]
        for size, rows in vectors.items()
    }
    right = {size: labels[~asked][rows] == labels[asked][:, None] for size, rows in found.items()}
    return {
        size: {
            "recall_at_10": overlap(rows, found[OWN]),
            "precision_at_10": float(right[size].mean()),
            "accuracy": float(right[size][:, 0].mean()),
        }
        for size, rows in found.items()
    }


def measure(drawings: Drawings, tower: VisionTower) -> dict[int, dict[str, float]]:
    """Per coarse patch size, what was predicted and what is true."""
    vectors = drawings.features(tower)
    true = truth(drawings, vectors)
    indexed = {size: rows[~drawings.is_query] for size, rows in vectors.items()}
    total = len(indexed[OWN])
    sample = np.random.default_rng(1).permutation(total)[:SAMPLE]
    table = {}
    for size in SIZES:
        whole = compare_vectors(indexed[OWN], indexed[size], total)
        part = compare_vectors(indexed[OWN][sample], indexed[size][sample], total)
        table[size] = {
            "neighbours": whole.neighbours,
            "neighbours_of_sample": part.neighbours,
            **true[size],
            "precision_of_own": true[size]["precision_at_10"] / true[OWN]["precision_at_10"],
            "accuracy_of_own": true[size]["accuracy"] / true[OWN]["accuracy"],
        }
        print(tower.config.name, size, {k: round(v, 3) for k, v in table[size].items()}, flush=True)
    return table


def summary(tables: dict[str, dict[Any, dict[str, float]]]) -> dict[str, Any]:
    """How well the agreement of all rows tells what is true of them."""
    rows = [row for table in tables.values() for row in table.values()]
    predicted = [row["neighbours"] for row in rows]
    correlations = {
        name: float(spearmanr(predicted, [row[name] for row in rows]).statistic)
        for name in ("recall_at_10", "precision_of_own", "accuracy_of_own", "neighbours_of_sample")
    }
    good = [row["precision_of_own"] for row in rows if row["neighbours"] >= MIN_NEIGHBOURS]
    bad = [row["precision_of_own"] for row in rows if row["neighbours"] < MIN_NEIGHBOURS]

    def largest_gap(name: str) -> float:
        return max(abs(row["neighbours"] - row[name]) for row in rows)

    return {
        "towers": tables,
        "rank_correlation_with_neighbours": correlations,
        "largest_gap_to_recall": largest_gap("recall_at_10"),
        "largest_gap_of_sample": largest_gap("neighbours_of_sample"),
        "threshold": MIN_NEIGHBOURS,
        "precision_of_own_above_threshold": [min(good, default=1.0), max(good, default=1.0)],
        "precision_of_own_below_threshold": [min(bad, default=0.0), max(bad, default=0.0)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    drawings = Drawings()
    dtype = distributed.resolve_dtype("fastest")
    tables = {}
    for name in TOWERS:
        tower = load_vision_tower(name, dtype=dtype).to(distributed.device())
        tables[name] = measure(drawings, tower)
    figures = {
        "own": OWN,
        "dtype": str(dtype),
        "indexed": int((~drawings.is_query).sum()),
        "queries": int(drawings.is_query.sum()),
        "sample": SAMPLE,
        **summary(tables),
    }
    found = figures["rank_correlation_with_neighbours"]
    gap = figures["largest_gap_to_recall"]
    targets = [
        Target("rank correlation, agreement to recall@10", ">= 0.9", found["recall_at_10"]),
        Target("rank correlation, agreement to precision@10", ">= 0.7", found["precision_of_own"]),
        Target("largest gap, agreement to recall@10", "<= 0.1", gap),
    ]
    packages = ("torch", "timm", "numpy", "scipy")
    finish("agreement", figures, targets, lambda file: _plot(file, tables), packages)


def _plot(file: Path, tables: dict[str, dict[int, dict[str, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axes, key, label in zip(
        both,
        ("recall_at_10", "precision_of_own"),
        ("recall@10 of other queries", "precision@10 of other queries, of patch 14's"),
        strict=True,
    ):
        for (name, table), marker in zip(tables.items(), "os", strict=True):
            points = [(row["neighbours"], row[key]) for row in table.values()]
            axes.plot(*zip(*points, strict=True), marker, label=name)
            for size, point in zip(table, points, strict=True):
                axes.annotate(f" {size}", point, fontsize=8)
        axes.set(xlabel="agreement with patch 14, by indexed images", ylabel=label)
        axes.axvline(MIN_NEIGHBOURS, color="grey", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
