"""Any grid, any shape: accuracy against tokens, and what becomes of pictures that are not square.

    python benchmarks/shapes.py [--model runs/demo/model]

Dial: square pictures, cut into every grid from 4 x 4 to 16 x 16 (patches of 56 to 14 pixels),
beside coarse to fine, which encodes again at the finest grid what 4 x 4 is unsure of; 500 drawings
of the held-out style, a fixed choice, as they cost most of the time, and 305 photographs. Shapes:
pictures that are not square, at equal tokens: `crop` (what the tower was made for), `squash`,
`aspect`; 872 drawings, half of them cut, half padded to 2:1 or 1:2 at random places, and 305
cut-out photographs on white as they are. Zero-shot: top-1 among 1,644 and 236 names. 1-NN: whether
the nearest other picture is of the same of Unicode's subgroups, of the package's folders. Gains are
paired, with 95% intervals by a bootstrap over subgroups and folders. Embeddings are kept in
runs/shapes, so that it may be stopped at any time.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float

from contrastive import LitModel
from contrastive.model.shaped import grid_of
from data.transform import Fit
from lib.harness import Target, finish
from lib.paired import mean_interval
from lib.shaped_sets import WAYS, PictureSet, drawings, photographs
from retrieval.evaluation.classify import close_calls, embed_classes
from retrieval.search.refine import blend

OUT = Path("runs/shapes")
SIDES = range(4, 17)
SHAPED = {
    16: ("shaped drawings", "shaped photographs"),
    64: ("shaped drawings", "shaped photographs"),
}
"""Budget -> what is measured at it."""
DIAL = {"drawings": 500, "photographs": 305}
"""How many pictures."""
MARGINS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
WORST = -0.01  # a default may lose so much at most, by the lower end of its interval
FITS: tuple[Fit, ...] = get_args(Fit)


class Measured:
    """A model's embeddings of the sets, computed once."""

    def __init__(self, folder: Path) -> None:
        self.model = LitModel.from_pretrained(folder)
        self.fingerprint = self.model.image_fingerprint
        self.text_fingerprint = self.model.text_fingerprint
        self.sets: dict[str, Callable[[], PictureSet]] = {
            "dial drawings": cache(lambda: drawings(DIAL["drawings"])),
            "dial photographs": cache(lambda: photographs(DIAL["photographs"])),
            "shaped drawings": cache(lambda: drawings(shaped=True)),
            "shaped photographs": cache(lambda: photographs(shaped=True)),
        }

    def embeds(self, name: str, max_tokens: int, fit: Fit = "crop") -> Float[np.ndarray, "n d"]:
        def compute() -> np.ndarray:
            self.model.vision.use_transform(fit=fit)
            found = self.model.encode_image(self.sets[name]().pictures, max_tokens=max_tokens)
            return found.numpy()

        count = len(self.sets[name]())
        key = f"{self.fingerprint[:8]}/{name.replace(' ', '-')}-{count}-{fit}-{max_tokens}"
        return _kept(OUT / f"{key}.npy", compute)

    def classes(self, name: str) -> Float[np.ndarray, "c d"]:
        def compute() -> np.ndarray:
            of = self.sets[name]()
            return embed_classes(self.model, of.class_names, of.templates)

        key = f"{self.text_fingerprint[:8]}/{name.split()[-1]}"
        return _kept(OUT / f"{key}.npy", compute)

    def tokens(self, name: str, max_tokens: int, fit: Fit) -> float:
        """Mean of what the pictures use of the budget."""
        self.model.vision.use_transform(fit=fit)
        grids = [
            grid_of(self.model.vision, (picture.height, picture.width), None, max_tokens)
            for picture in self.sets[name]().pictures
        ]
        return float(np.mean([grid.num_tokens for grid in grids]))

    def zero_shot(self, name: str, embeds: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        return (embeds @ self.classes(name).T).argmax(1) == self.sets[name]().labels

    def nearest(self, name: str, embeds: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        """Of the pictures whose kind has another picture; the others are never right."""
        kinds = self.sets[name]().kinds
        similarity = embeds @ embeds.T
        np.fill_diagonal(similarity, -np.inf)
        return kinds[similarity.argmax(1)] == kinds


def _kept(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    if not file.exists():
        start = time.perf_counter()
        found = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        np.save(part, found)
        part.replace(file)
        print(f"{file}: {len(found)} in {time.perf_counter() - start:.0f} s", flush=True)
    return np.load(file)


# ---- the dial ------------------------------------------------------------------------------


def dial(measured: Measured) -> list[dict[str, Any]]:
    """One row per grid. Its mean is that of all pictures' two tasks; on the frontier are the grids
    whose mean no cheaper grid reaches. Gains are paired, over the best of the cheaper grids."""
    rows: list[dict[str, Any]] = []
    scores: dict[int, Float[np.ndarray, " n"]] = {}
    kinds = [measured.sets[f"dial {name}"]().kinds for name in DIAL]
    everyone = np.concatenate([kinds[0], kinds[1] + kinds[0].max() + 1])
    for side in SIDES:
        right: dict[str, list[np.ndarray]] = {}
        for name in DIAL:
            embeds = measured.embeds(f"dial {name}", side * side)
            found = (measured.zero_shot, measured.nearest)
            right[name] = [task(f"dial {name}", embeds).astype(float) for task in found]
        row: dict[str, Any] = {"grid": side, "tokens": side * side}
        row["patch_size"] = measured.model.image_size // side
        row["intervals_95"] = {}
        for (name, found_right), groups in zip(right.items(), kinds, strict=True):
            for task, each in zip(("zero-shot", "1-NN"), found_right, strict=True):
                row[f"{name}, {task}"] = float(each.mean())
                row["intervals_95"][f"{name}, {task}"] = list(mean_interval(each, groups))
        scores[side] = np.concatenate([np.mean(found, 0) for found in right.values()])
        row["mean"] = float(scores[side].mean())
        row["frontier"] = all(row["mean"] > other["mean"] for other in rows)
        if rows:
            best = max(rows, key=lambda other: other["mean"])["grid"]
            gain = scores[side] - scores[best]
            row["over_best_cheaper"] = {
                "grid": best,
                "gain": float(gain.mean()),
                "interval_95": list(mean_interval(gain, everyone)),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def coarse_to_fine(measured: Measured) -> list[dict[str, float]]:
    """Zero-shot of drawings: 4 x 4 for all, the finest grid too where two names are close."""
    name = "dial drawings"
    coarse, fine = (
        measured.embeds(name, side**2) @ measured.classes(name).T for side in (SIDES[0], SIDES[-1])
    )
    best = -np.sort(-coarse, axis=1)[:, :2]
    rows = []
    for margin in MARGINS:
        close = close_calls(best, margin)
        scores = np.where(close[:, None], blend(fine, coarse), coarse)
        right = scores.argmax(1) == measured.sets[name]().labels
        tokens = SIDES[0] ** 2 + float(close.mean()) * SIDES[-1] ** 2
        rows.append({"margin": margin, "tokens": tokens, "zero-shot": float(right.mean())})
    return rows


# ---- shapes --------------------------------------------------------------------------------


def compare(measured: Measured, budget: int) -> dict[str, Any]:
    """Every fit at one budget, its gain over the crop, and of `aspect` over `squash`."""
    table: dict[str, Any] = {}
    pooled: dict[str, dict[str, list[np.ndarray]]] = {}
    groups: list[np.ndarray] = []
    for name in SHAPED[budget]:
        right: dict[str, dict[str, np.ndarray]] = {"zero-shot": {}, "1-NN": {}}
        for fit in FITS:
            embeds = measured.embeds(name, budget, fit)
            right["zero-shot"][fit] = measured.zero_shot(name, embeds)
            right["1-NN"][fit] = measured.nearest(name, embeds)
        kinds = measured.sets[name]().kinds
        table[name] = {
            "pictures": len(kinds),
            "tokens": {fit: measured.tokens(name, budget, fit) for fit in FITS},
            **{task: gains(found, kinds) for task, found in right.items()},
        }
        for task, found in right.items():
            if (way := measured.sets[name]().way) is not None:
                for number, made in enumerate(WAYS):
                    part = {fit: rows[way == number] for fit, rows in found.items()}
                    table[name][f"{task}, {made}"] = gains(part, kinds[way == number])
            for fit in FITS:
                pooled.setdefault(task, {}).setdefault(fit, []).append(found[fit])
        groups.append(kinds + (groups[-1].max() + 1 if groups else 0))
    everyone = np.concatenate(groups)
    table["pooled"] = {"pictures": len(everyone)}
    for task, fits in pooled.items():
        joined = {fit: np.concatenate(parts) for fit, parts in fits.items()}
        table["pooled"][task] = gains(joined, everyone)
    return table


def gains(right: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """Accuracies, and paired differences with their intervals."""
    figures: dict[str, Any] = {fit: float(found.mean()) for fit, found in right.items()}
    for one, other in (("aspect", "crop"), ("squash", "crop"), ("aspect", "squash")):
        difference = right[one].astype(float) - right[other]
        figures[f"{one} over {other}"] = {
            "gain": float(difference.mean()),
            "interval_95": list(mean_interval(difference, groups)),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    args = parser.parse_args()

    measured = Measured(args.model)
    shapes = {}
    for budget in sorted(SHAPED, reverse=True):
        shapes[budget] = compare(measured, budget)
        print(budget, json.dumps(shapes[budget]["pooled"], indent=1), flush=True)
    rows = dial(measured)
    refined = coarse_to_fine(measured)
    figures = {
        "model": measured.model.vision.config.name,
        "dial_pictures": DIAL,
        "dial": rows,
        "frontier": [row["grid"] for row in rows if row["frontier"]],
        "coarse_to_fine": refined,
        "shapes": shapes,
    }
    targets = [
        Target(
            f"1-NN of {shapes[budget]['pooled']['pictures']} pictures at {budget} tokens, aspect "
            "over crop, lower end of its 95% interval",
            f">= {WORST}",
            shapes[budget]["pooled"]["1-NN"]["aspect over crop"]["interval_95"][0],
        )
        for budget in SHAPED
        if shapes[budget]["pooled"]["pictures"] >= 1000
    ]
    finish("shapes", figures, targets, lambda file: _plot(file, rows, refined, shapes))


def _plot(
    file: Path,
    rows: list[dict[str, Any]],
    refined: list[dict[str, float]],
    shapes: Mapping[int, Mapping[str, Any]],
) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2)
    )
    tokens = [row["tokens"] for row in rows]
    for name in rows[0]["intervals_95"]:
        (line,) = left.plot(tokens, [row[name] for row in rows], "o-", markersize=4, label=name)
        ends = np.array([row["intervals_95"][name] for row in rows])
        left.fill_between(tokens, *ends.T, color=line.get_color(), alpha=0.12, linewidth=0)
    left.plot(
        [row["tokens"] for row in refined],
        [row["zero-shot"] for row in refined],
        ":",
        color="C0",
        label="drawings, zero-shot, 4 x 4 then 16 x 16",
    )
    left.set(xlabel="tokens per picture", ylabel="accuracy", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bars = [
        (f"{task}, {budget} tokens, {fit}", shapes[budget]["pooled"][task][f"{fit} over crop"])
        for task in ("1-NN", "zero-shot")
        for budget in shapes
        for fit in ("aspect", "squash")
    ]
    places = np.arange(len(bars))[::-1]
    middle = np.array([bar["gain"] for _, bar in bars])
    ends = np.array([bar["interval_95"] for _, bar in bars])
    right.errorbar(middle, places, xerr=np.abs(ends.T - middle), fmt="o", capsize=3)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks(places, [name for name, _ in bars], fontsize=8)
    right.set(xlabel="gain over the crop, 95% interval")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
