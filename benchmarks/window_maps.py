"""Maps by words of windows against those of patches, at what they cost.

    python benchmarks/window_maps.py        # after make demo; ten minutes

The demo's model, whose feature is the class token, on scenes of `python -m data.scenes`: 50 classes
a folder, held-out concepts and a held-out style apart. A patch's token stands in the class token's
place after the last norm; a window is a whole picture. mIoU is over the classes of things, with the
least cosine that is no background chosen on train/ for each row; inside: of the pixels of things
alone. Intervals: scenes drawn with replacement, the same for both. Maps are kept in
runs/window_maps.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contrastive import LitModel
from contrastive.recipes import default_data
from data.dense.picture import IGNORED
from data.emoji.build import build_emoji
from data.scenes.build import build_scenes
from lib.dense_figure import Column, draw_columns
from lib.dense_maps import NUM_QUANTILES, Scenes
from lib.harness import Target, finish, interleave
from retrieval import ZeroShotSegmenter
from retrieval.dense.miou import IoUCounter

OUT = Path("runs/window_maps")
FOLDERS = ("train", "heldout_captions", "heldout_style")
ROWS: dict[str, tuple[tuple[int, ...], int]] = {
    "patches at 56": ((), 56),
    "patches at 28": ((), 28),
    "patches at 14": ((), 14),
    "3 x 3 at 56": ((3,), 56),
    "5 x 5 at 56": ((5,), 56),
    "3 x 3, 5 x 5 at 56": ((3, 5), 56),
    "3 x 3, 5 x 5 at 28": ((3, 5), 28),
}
"""Name -> windows and patch size."""
BEST, BASE = "3 x 3, 5 x 5 at 56", "patches at 14"
FIGURE = {"patches, 14": BASE, "windows, 56": BEST, "windows, 28": "3 x 3, 5 x 5 at 28"}
SHOWN = FOLDERS[2]
DRAWS = 1000


class Row:
    """One way to make maps, on all folders."""

    def __init__(self, name: str, model: LitModel, scenes: dict[str, Scenes]) -> None:
        self.name, self.scenes = name, scenes
        windows, self.patch_size = ROWS[name]
        self.segmenters = {
            split: ZeroShotSegmenter(
                model, each.folder.class_names, each.folder.templates, windows=windows
            )
            for split, each in scenes.items()
        }
        self.maps = {split: self._maps(split) for split in scenes}
        values = np.concatenate([m.max(-1).ravel() for m in self.maps["train"]])
        steps = np.arange(1, NUM_QUANTILES + 1) / (NUM_QUANTILES + 1)
        scores = [
            (of_things(self.counts("train", t).sum(0)), t) for t in np.quantile(values, steps)
        ]
        self.threshold = max(scores)[1]

    def _maps(self, split: str) -> Float[np.ndarray, "n r c k"]:
        model = self.segmenters[split].model
        fingerprint = f"{model.image_fingerprint[:12]}-{model.text_fingerprint[:12]}"
        file = (
            OUT / f"{fingerprint}-{len(self.scenes[split].pictures)}" / f"{self.name}.{split}.npy"
        )
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            found = [
                self.segmenters[split].similarities(picture, self.patch_size)[0]
                for picture in self.scenes[split].pictures
            ]
            np.save(file, np.stack(found))
            print(file, flush=True)
        loaded: np.ndarray = np.load(file)
        return loaded

    def counts(self, split: str, threshold: float | None) -> Int[np.ndarray, "n k k"]:
        """Of pixels by true and found label, of each scene. None: of the pixels of things."""
        segmenter, out = self.segmenters[split], []
        for values, true in zip(self.maps[split], self.scenes[split].masks, strict=True):
            best, most = segmenter.best(values, (true.shape[0], true.shape[1]))
            counter = IoUCounter(len(segmenter.class_names))
            if threshold is None:
                counter.add(np.where(true == 0, IGNORED, true), best)
            else:
                counter.add(true, np.where(most < threshold, 0, best))
            out.append(counter.counts)
        return np.stack(out)

    def column(self, split: str) -> Column:
        return lambda number: (self.maps[split][number], self.threshold)


def of_things(counts: Int[np.ndarray, "k k"]) -> float:
    """Mean IoU over the classes that the true masks hold, background left out."""
    hit, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    there = true[1:] > 0
    return float((hit[1:] / np.maximum(1, true + found - hit)[1:])[there].mean())


def compare(row: Row, base: Row, split: str) -> dict[str, Any]:
    """mIoU of things, the share of their pixels that are right, and the ratio to the base."""
    counts = [each.counts(split, each.threshold) for each in (row, base)]
    rng, ratios = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(counts[0]), len(counts[0]))
        ours, theirs = (of_things(each[drawn].sum(0)) for each in counts)
        ratios.append(ours / max(theirs, 1e-9))
    inside = row.counts(split, None).sum(0)
    return {
        "miou": round(of_things(counts[0].sum(0)), 4),
        "inside": round(float(inside.trace() / inside.sum()), 4),
        f"over {base.name}": round(of_things(counts[0].sum(0)) / of_things(counts[1].sum(0)), 3),
        "interval_95": [round(float(q), 3) for q in np.quantile(ratios, (0.025, 0.975))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--scenes", type=int, default=40, help="of each folder")
    parser.add_argument("--rounds", type=int, default=10, help="of timing")
    args = parser.parse_args()
    build_emoji(default_data())
    root = build_scenes(OUT / f"scenes.{args.scenes}", count=args.scenes)
    scenes = {split: Scenes.read(str(root / split), args.scenes) for split in FOLDERS}
    model = LitModel.from_pretrained(args.model)
    rows = {name: Row(name, model, scenes) for name in ROWS}
    picture = scenes["train"].pictures[0]
    timings = interleave(
        {
            name: partial(row.segmenters["train"].predict, picture, row.patch_size)
            for name, row in rows.items()
        },
        args.rounds,
    )
    table: dict[str, dict[str, Any]] = {}
    for name, (windows, patch_size) in ROWS.items():
        count = sum(each * each for each in windows) or 1
        table[name] = {
            "windows": count,
            "gflops": round(count * model.vision.gflops(patch_size), 1),
            "ms": round(1000 * timings.median(name)),
            "ms_quartiles": [round(1000 * q) for q in timings.quartiles(name)],
            **{split: compare(rows[name], rows[BASE], split) for split in FOLDERS},
        }
        print(name, table[name], flush=True)
    targets = [
        Target(
            f"{split}: mIoU of {BEST} over that of {BASE}",
            ">= 2",
            table[BEST][split][f"over {BASE}"],
        )
        for split in FOLDERS[1:]
    ]
    figures = {"scenes": args.scenes, "classes": 50, "rows": table}
    columns = {title: rows[name].column(SHOWN) for title, name in FIGURE.items()}
    finish("window_maps", figures, targets, lambda file: draw_columns(file, scenes[SHOWN], columns))


if __name__ == "__main__":
    main()
