"""Does a tower that is made flexible on rectangles read pictures that are not square better?

    python benchmarks/random_shapes.py        # most of an hour on two cores

`dinov2s-flexi` learns on from `dinov2s` by its own recipe, once on squares, once on rectangles of
random shapes (`--student.max-aspect 2`), as many steps of the same images each. Tests are those of
benchmarks/shapes.py: pictures that are not square (drawings of the held-out style and photographs)
by `aspect` and `crop`, and the same drawings as squares; right is a picture whose nearest other one
(cosine of centred features) is of its kind. Gains are paired, with 95% intervals by a bootstrap
over kinds. Runs and features are kept in runs/random_shapes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from contrastive import VisionTower, distributed, load_vision_tower
from contrastive.flexify.loop import flexify
from contrastive.model.shaped import shaped_features, shaped_pixels
from contrastive.recipes import default_data, dinov2s
from data.config import Fit
from data.emoji.build import build_emoji
from lib.harness import Target, finish
from lib.paired import mean_interval
from lib.shaped_sets import PictureSet, drawings, photographs

OUT = Path("runs/random_shapes")
BUDGETS = (16, 64)
TESTS: dict[str, Fit] = {"whole": "aspect", "cropped": "crop", "square": "crop"}


def trained(name: str, max_aspect: float, steps: int) -> Path:
    """A run's tower, trained unless it was before."""
    recipe = dinov2s()
    folder = OUT / f"{name}.{steps}"
    if not (folder / "model").exists():
        flexify(
            replace(
                recipe,
                name=folder.name,
                out=str(OUT),
                data=replace(recipe.data, features=""),
                student=replace(recipe.student, tower="dinov2s-flexi", max_aspect=max_aspect),
                loss=replace(recipe.loss, normaliser_samples=256),
                optim=replace(recipe.optim, lr=recipe.optim.lr / 2, warmup_steps=10),
                val_samples=64,
                global_batch_size=32,
                steps=steps,
                checkpoint_every=0,
            )
        )
    return folder / "model"


@torch.no_grad()
def features(tower: VisionTower, pictures: PictureSet, budget: int) -> Float[Tensor, "n d"]:
    file = OUT / "features" / f"{tower.fingerprint[:16]}-{len(pictures)}-{id_of(pictures)}-{budget}"
    file = file.with_suffix(f".{tower.transform.fit}.npy")
    if not file.exists():
        parts = [
            shaped_features(tower, [shaped_pixels(tower, p, None, budget) for p in some])
            for some in (pictures.pictures[i : i + 64] for i in range(0, len(pictures), 64))
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, torch.cat(parts).cpu().numpy())
    return torch.from_numpy(np.load(file))


def id_of(pictures: PictureSet) -> int:
    """Tells sets of as many pictures apart."""
    return sum(p.width for p in pictures.pictures)


def right(found: Float[Tensor, "n d"], pictures: PictureSet) -> Bool[np.ndarray, " n"]:
    unit = F.normalize(found - found.mean(0), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1).numpy()
    return pictures.kinds[nearest] == pictures.kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    build_emoji(default_data())
    towers = {"before": "dinov2s-flexi"}
    for name, max_aspect in (("rectangles", 2.0), ("squares", 1.0)):
        towers[name] = str(trained(name, max_aspect, args.steps))
    shaped = [drawings(shaped=True), photographs(shaped=True)]
    sets = {"whole": shaped, "cropped": shaped, "square": [drawings()]}
    scores: dict[str, dict[str, Bool[np.ndarray, " n"]]] = {}
    for name, spec in towers.items():
        tower = load_vision_tower(spec).to(distributed.device())
        scores[name] = {}
        for test, fit in TESTS.items():
            tower.use_transform(fit=fit)
            for budget in BUDGETS:
                found = [right(features(tower, each, budget), each) for each in sets[test]]
                scores[name][f"{test}@{budget}"] = np.concatenate(found)
    table: dict[str, dict[str, Any]] = {}
    for test in scores["before"]:
        parts = sets[test.partition("@")[0]]
        kinds = np.concatenate(
            [parts[0].kinds, *(p.kinds + parts[0].kinds.max() + 1 for p in parts[1:])]
        )
        table[test] = {name: float(found[test].mean()) for name, found in scores.items()}
        for other in ("before", "squares"):
            gain = scores["rectangles"][test].astype(float) - scores[other][test]
            low, high = mean_interval(gain, kinds)
            table[test][f"rectangles over {other}"] = [float(gain.mean()), low, high]
        print(test, table[test], flush=True)
    targets = [
        Target(
            f"whole at {budget} tokens, rectangles over squares, lower end of its interval",
            ">= 0.0",
            table[f"whole@{budget}"]["rectangles over squares"][1],
        )
        for budget in BUDGETS
    ]
    figures = {"towers": towers, "steps": args.steps, "global_batch_size": 32, "accuracy": table}
    finish("random_shapes", figures, targets)


if __name__ == "__main__":
    main()
