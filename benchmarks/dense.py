"""Where in the picture: masks by words, from models that saw whole drawings and captions alone.

    python benchmarks/dense.py                        # after make demo
    python benchmarks/dense.py --seeds 1 --scenes 20  # a short run that only shows that it works

Scenes of `python -m data.scenes`, 50 classes a folder: held-out concepts and a held-out style
apart. Base: a model over the class token (the demo's features), whose map is its patch tokens after
the last norm in the class token's place. Beside it the value path of its last block (MaskCLIP), and
models over [class; mean of patches] and over the mean after block 10, all trained alike on the
demo's drawings, which are whole pictures on white. The least cosine that is no background is chosen
on the scenes of train/, for each model and patch size. mIoU: over the classes of things;
`inside`: of the pixels of things alone. Models, features and what was measured are kept in
runs/dense, so that it may be stopped at any time.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive import LitModel, distributed
from contrastive.recipes import default_data
from data.emoji.build import build_emoji
from data.scenes.build import build_scenes
from lib.dense_figure import draw_figure
from lib.dense_maps import PARTS, JoinedTower, Scenes, class_maps, judge, of_things
from lib.dense_models import trained_model
from lib.harness import Target, finish, interleave
from retrieval import ZeroShotSegmenter

OUT = Path("runs/dense")
SIZES = (56, 32, 28, 16, 14)
TESTS = ("heldout_captions", "heldout_style")
BASE = "class token"
ROWS: dict[str, tuple[str, bool]] = {
    BASE: ("own", False),
    "class token, value path": ("own", True),
    "[class; mean]": ("cls+mean", False),
    "[class; mean], value path": ("cls+mean", True),
    "mean@10": ("mean@10", False),
}
"""Name -> features of the model, and whether the map goes by the value path."""


class Bench:
    """What was measured, kept in a file."""

    def __init__(self, scenes: Mapping[str, Scenes], seeds: int) -> None:
        self.scenes, self.seeds = scenes, seeds
        self.file = OUT / f"measured.{len(scenes['train'].masks)}.json"
        self.done: dict[str, dict[str, float]] = {}
        if self.file.exists():
            self.done = json.loads(self.file.read_text())
        self.models: dict[tuple[str, int], LitModel] = {}
        self.segmenters: dict[tuple[str, int, str], ZeroShotSegmenter] = {}

    def segmenter(self, row: str, seed: int, split: str) -> ZeroShotSegmenter:
        key, (features, value_path) = (row, seed, split), ROWS[row]
        if key not in self.segmenters:
            if (features, seed) not in self.models:
                folder = trained_model(features, seed, OUT)
                self.models[features, seed] = LitModel.from_pretrained(folder)
            names = self.scenes[split].folder
            self.segmenters[key] = ZeroShotSegmenter(
                self.models[features, seed],
                names.class_names,
                names.templates,
                value_path=value_path,
            )
        return self.segmenters[key]

    def measure(self, tower: JoinedTower, patch_size: int, value_path: bool) -> None:
        """All rows that go by this path, on all scenes."""
        keys = {
            f"{row}/{seed}@{patch_size}": (row, seed)
            for row, (_, by_values) in ROWS.items()
            for seed in range(self.seeds)
            if by_values == value_path
        }
        missing = {key: value for key, value in keys.items() if key not in self.done}
        if not missing:
            return
        thresholds: dict[str, float] = {}
        found: dict[str, dict[str, float]] = {key: {} for key in missing}
        for split, scenes in self.scenes.items():  # train first
            parts = tower.features(scenes, patch_size, value_path)
            for key, (row, seed) in missing.items():
                segmenter = self.segmenter(row, seed, split)
                joined = torch.cat([parts[i] for i in PARTS[ROWS[row][0]]], dim=-1)
                maps = list(class_maps(segmenter, joined))
                if seed == 0 and split == "train":  # one pass for all is each model's own
                    own = segmenter.similarities(scenes.pictures[0], patch_size)[0]
                    np.testing.assert_allclose(maps[0], own, atol=2e-3)
                chosen = None if split == "train" else [thresholds[key]]
                judged = judge(maps, segmenter, scenes.masks, chosen)
                scores = [of_things(counter) for counter in judged.counters]
                best = int(np.argmax(scores))
                thresholds[key] = judged.thresholds[best]
                found[key][split] = scores[best]
                found[key][f"{split}, inside"] = of_things(judged.inside)
                found[key][f"{split}, pixels inside"] = judged.inside.result().pixel_accuracy
            del parts
        for key in missing:
            self.done[key] = {**found[key], "threshold": thresholds[key]}
            print(
                key, {name: round(value, 4) for name, value in self.done[key].items()}, flush=True
            )
        self.file.write_text(json.dumps(self.done, indent=1) + "\n")

    def rows(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Row -> patch size -> what: mean over seeds and, of several, standard deviation."""
        out: dict[str, dict[str, dict[str, list[float]]]] = {}
        for row in ROWS:
            out[row] = {}
            for size in SIZES:
                seeds = [self.done[f"{row}/{seed}@{size}"] for seed in range(self.seeds)]
                out[row][str(size)] = {
                    what: _summary([seed[what] for seed in seeds]) for what in seeds[0]
                }
        return out


def _summary(values: Sequence[float]) -> list[float]:
    spread = [float(np.std(values, ddof=1))] if len(values) > 1 else []
    return [round(value, 4) for value in (float(np.mean(values)), *spread)]


def costs(segmenter: ZeroShotSegmenter, scenes: Scenes, rounds: int) -> dict[str, dict[str, Any]]:
    """Of a picture at each patch size: operations of the tower, and milliseconds of its mask."""
    picture = scenes.pictures[0]
    timings = interleave(
        {str(size): partial(segmenter.predict, picture, size) for size in SIZES}, rounds
    )
    tower = segmenter.model.vision
    found = {}
    for size in SIZES:
        low, high = timings.quartiles(str(size))
        found[str(size)] = {
            "gflops": round(tower.gflops(size), 2),
            "ms": round(1000 * timings.median(str(size)), 1),
            "ms_quartiles": [round(1000 * low, 1), round(1000 * high, 1)],
        }
    return found


def best(rows: Mapping[str, Any], row: str, what: str) -> float:
    """At the patch size where it is best."""
    return max(size[what][0] for size in rows[row].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=60, help="of each folder")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    args = parser.parse_args()
    distributed.ensure_group()
    build_emoji(default_data())
    root = build_scenes(OUT / f"scenes.{args.scenes}", count=args.scenes)
    scenes = {s: Scenes.read(str(root / s), args.scenes) for s in ("train", *TESTS)}
    bench = Bench(scenes, args.seeds)
    for features, _ in ROWS.values():
        for seed in range(args.seeds):
            trained_model(features, seed, OUT)
    tower = JoinedTower()
    for size in SIZES:
        for value_path in (False, True):
            bench.measure(tower, size, value_path)
    rows = bench.rows()
    segmenter = bench.segmenter("[class; mean]", 0, "heldout_style")
    cost = costs(segmenter, scenes["heldout_style"], args.rounds)
    targets = [
        Target(
            f"{test}: mIoU of [class; mean] over the class token's own map",
            ">= 2",
            round(best(rows, "[class; mean]", test) / best(rows, BASE, test), 3),
        )
        for test in TESTS
    ]
    targets.append(Target("ms of a map of 224 px at patch 14", "<= 150", cost["14"]["ms"]))
    figures = {
        "scenes": args.scenes, "classes": len(segmenter.class_names), "seeds": args.seeds,
        "costs": cost, "rows": rows,
    }  # fmt: skip
    finish(
        "dense",
        figures,
        targets,
        plot=lambda file: draw_figure(file, bench.segmenter, scenes, bench.done),
        packages=("torch", "timm", "transformers", "numpy"),
    )


if __name__ == "__main__":
    main()
