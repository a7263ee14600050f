"""Boxes by words: trained heads against regions of maps, of the same model, at every patch size.

    python benchmarks/detector.py            # after make demo, whose model and drawings it takes

Heads are trained on scenes of all trained things (`python -m data.scenes --boxes`) at random patch
sizes, and asked for the 50 things of other scenes: trained ones, ones whose captions were never
trained, and trained ones in a style that never was. Beside them connected regions of the model's
own maps, of patches and, at 56 alone, of 34 windows, above the cosine that is best on the first of
these folders, for each patch size. The features of patches are computed once and kept in
runs/detector, as are runs and what was measured, so that it may be stopped at any time. AP50 over
classes, as COCO has it.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from contrastive import LitModel, VisionTower, distributed, load_vision_tower
from contrastive.dense.config import PicturesConfig
from contrastive.dense.decoder_folder import ClassTexts, load_decoder
from contrastive.dense.loop import train_decoder
from contrastive.dense.patch_source import PatchSource
from contrastive.dense.targets import BoxTargets
from contrastive.recipes import boxes
from contrastive.run.checkpoint import complete_checkpoints
from data.dense.layouts import load_dense
from data.dense.picture import TrueBox
from data.scenes.build import SPLITS, build_scenes
from lib.harness import Target, finish
from retrieval import TrainedDetector, ZeroShotSegmenter
from retrieval.dense.average_precision import AveragePrecision, ScoredBox
from retrieval.dense.connected import boxes_of
from retrieval.dense.trained_boxes import scored_boxes
from retrieval.evaluation.classify import embed_classes

OUT = Path("runs/detector")
SIZES = (56, 32, 28, 16, 14)
WINDOWS, WINDOW_SIZES = (3, 5), (56,)
SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Of pixels that are background: cosines to choose from."""


class Test:
    """A folder of scenes, the features of its patches cached."""

    def __init__(self, folder: Path, tower: VisionTower, cache: Path) -> None:
        self.dataset = load_dense(folder)
        self.source = PatchSource(tower, self.dataset, BoxTargets())
        self.source.use_cache(str(cache), SIZES)
        pictures = list(self.dataset)
        self.images: list[Image.Image] = [picture.image for picture in pictures]
        self.true: list[tuple[TrueBox, ...]] = [picture.boxes or () for picture in pictures]

    def features(self, patch_size: int) -> Iterator[Float[torch.Tensor, "1 r c f"]]:
        for row in range(len(self.dataset)):
            yield self.source(np.array([row]), patch_size)[0]

    def ap50(self, found: Sequence[Sequence[ScoredBox]]) -> float:
        precision = AveragePrecision()
        for true, boxes_found in zip(self.true, found, strict=True):
            precision.add(true, boxes_found)
        return precision.mean


def trained(model: str, folder: Path, seed: int, steps: int, features: Path) -> Path:
    """The run folder of heads."""
    recipe = boxes()
    cfg = replace(
        recipe,
        name=f"heads-{seed}-{steps}",
        out=str(OUT / "runs"),
        data=PicturesConfig(str(folder), features=str(features)),
        vision=replace(recipe.vision, tower=model, patch_sizes=SIZES),
        eval_data=(),
        steps=steps,
        seed=seed,
    )
    if not (cfg.folder / "model").is_dir():
        dataset, loaded = load_dense(folder), LitModel.from_pretrained(model)
        embeds = embed_classes(loaded, dataset.class_names, dataset.templates)
        texts = ClassTexts(embeds, loaded.text_fingerprint, loaded.image_affine())
        begun = bool(complete_checkpoints(cfg.folder / "checkpoints"))
        train_decoder(cfg, dataset, texts=texts, resume=begun)
    return cfg.folder


@torch.no_grad()
def of_heads(test: Test, detector: TrainedDetector, patch_size: int) -> float:
    found = []
    for features, image in zip(test.features(patch_size), test.images, strict=True):
        seen = detector.heads(features, detector.class_embeds)
        found += scored_boxes(seen, [(image.height, image.width)], 0.0)
    return test.ap50(found)


Map = Float[np.ndarray, "r c k"]


@torch.no_grad()
def of_patches(test: Test, asked: ZeroShotSegmenter, patch_size: int) -> Iterator[Map]:
    for features in test.features(patch_size):
        embeds = asked.model.embed_features(features.flatten(0, 2))
        cosines = (embeds @ asked.class_embeds.T).unflatten(0, features.shape[1:3])
        yield cosines.float().cpu().numpy()


def of_windows(test: Test, asked: ZeroShotSegmenter, patch_size: int) -> Iterator[Map]:
    for image in test.images:
        yield asked.similarities(image, patch_size)[0]


def best_of(
    test: Test, asked: ZeroShotSegmenter, maps: Iterator[Map], least: float | None
) -> tuple[float, float]:
    """AP50 of regions above a cosine, and the cosine: the best one where none is given."""
    pixels = [
        asked.best(each, (image.height, image.width))
        for each, image in zip(maps, test.images, strict=True)
    ]
    every = np.concatenate([most.ravel() for _, most in pixels])
    tried = [least] if least is not None else np.quantile(every, SHARES).tolist()
    results = []
    for cosine in tried:
        found = [boxes_of(np.where(most < cosine, 0, labels), most) for labels, most in pixels]
        results.append((test.ap50(found), cosine))
    return max(results)


def measure_maps(
    done: dict[str, float],
    tests: Mapping[str, Test],
    row: str,
    sizes: Sequence[int],
    asked: Callable[[Test], ZeroShotSegmenter],
    maps: Callable[[Test, ZeroShotSegmenter, int], Iterator[Map]],
) -> None:
    for size in sizes:
        for name, test in tests.items():  # the first chooses the cosine
            key = f"{row}/{name}@{size}"
            if key not in done:
                least = done.get(f"{row}/cosine@{size}")
                segmenter = asked(test)
                done[key], cosine = best_of(test, segmenter, maps(test, segmenter, size), least)
                done[f"{row}/cosine@{size}"] = cosine
                keep(done)


def keep(done: dict[str, float]) -> None:
    (OUT / "measured.json").write_text(json.dumps(done, indent=1) + "\n")


def summary(done: Mapping[str, float], row: str, test: str, size: int, seeds: int) -> list[float]:
    """Mean over seeds and, of several, standard deviation."""
    keys = [f"{row}/{seed}/{test}@{size}" for seed in range(seeds)]
    values = [done[key] for key in keys if key in done] or [done[f"{row}/{test}@{size}"]]
    spread = [float(np.std(values, ddof=1))] if len(values) > 1 else []
    return [round(value, 4) for value in (float(np.mean(values)), *spread)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--scenes", type=int, default=600, help="to train on")
    parser.add_argument("--tests", type=int, default=60, help="scenes of each folder to measure on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    distributed.ensure_group()
    OUT.mkdir(parents=True, exist_ok=True)
    scenes = build_scenes(OUT / f"scenes.{args.scenes}", args.scenes, boxes=True) / "train"
    root = build_scenes(OUT / f"tests.{args.tests}", args.tests, seed=1)
    dtype = distributed.resolve_dtype("fastest")
    tower = load_vision_tower(args.model, dtype=dtype)
    features = OUT / f"features.{args.tests}"
    tests = {name: Test(root / name, tower, features / name) for name in SPLITS}
    file = OUT / "measured.json"
    done: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    model = LitModel.from_pretrained(args.model)

    def asked(test: Test, windows: Sequence[int] = ()) -> ZeroShotSegmenter:
        names, templates = test.dataset.class_names, test.dataset.templates
        return ZeroShotSegmenter(model, names, templates, windows=windows)

    for seed in range(args.seeds):
        folder = trained(args.model, scenes, seed, args.steps, OUT / "features")
        loaded = load_decoder(folder / "model", tower)
        for name, test in tests.items():
            names, templates = test.dataset.class_names, test.dataset.templates
            detector = TrainedDetector(loaded, model, names, templates)
            for size in SIZES:
                done[f"heads/{seed}/{name}@{size}"] = of_heads(test, detector, size)
                print(f"heads/{seed}/{name}@{size}", done[f"heads/{seed}/{name}@{size}"])
        keep(done)
    measure_maps(done, tests, "patches", SIZES, asked, of_patches)
    measure_maps(
        done, tests, "windows", WINDOW_SIZES, lambda test: asked(test, WINDOWS), of_windows
    )
    rows: dict[str, Any] = {
        row: {
            name: {str(size): summary(done, row, name, size, args.seeds) for size in sizes}
            for name in tests
        }
        for row, sizes in (("heads", SIZES), ("patches", SIZES), ("windows", WINDOW_SIZES))
    }
    targets = []
    for name in tests:
        heads = max(value[0] for value in rows["heads"][name].values())
        maps = max(v[0] for row in ("patches", "windows") for v in rows[row][name].values())
        what = f"{name}: AP50 of heads over that of the best maps, each at its best patch size"
        targets.append(Target(what, ">= 2", round(heads / maps, 3)))
    figures = {
        "scenes": args.scenes, "classes": len(load_dense(scenes).class_names), "steps": args.steps,
        "tests": args.tests, "seeds": args.seeds, "rows": rows,
        "parameters": sum(p.numel() for p in loaded.decoder.parameters()),
    }  # fmt: skip
    finish("detector", figures, targets, packages=("torch", "timm", "deepspeed", "numpy"))


if __name__ == "__main__":
    main()
