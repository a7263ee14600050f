"""A decoder trained at one patch size and at random ones, evaluated at every size.

    python benchmarks/dense_decoders.py            # after make demo, whose drawings it takes

Scenes of `python -m data.scenes --kinds`: six kinds of things, which things that are never trained
have too, and a style that is never trained. Random patch sizes are drawn as often as each has
patches, and evenly. The features of the locked tower's patches are computed once and kept in
runs/decoders, as is what was measured, so that it may be stopped at any time, and rows are of all
seeds that were measured. SegFormer's MLP reads the last block alone here, as the others do. mIoU
over the six kinds; the background is in none of them, but a thing that is called background counts
against its kind.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch.nn.functional import interpolate

from contrastive import VisionTower, distributed, load_vision_tower
from contrastive.dense.config import DecoderConfig, DenseConfig, Kind, PicturesConfig
from contrastive.dense.decoder_folder import TrainedDecoder, load_decoder
from contrastive.dense.loop import train_decoder
from contrastive.dense.patch_source import PatchSource
from contrastive.recipes import scenes
from contrastive.run.checkpoint import complete_checkpoints
from data.dense.layouts import load_dense
from data.scenes.build import build_scenes
from lib.harness import Target, finish
from retrieval.dense.miou import IoUCounter

OUT = Path("runs/decoders")
SIZES = (56, 32, 28, 16, 14)
MOST_SEEDS = 99
TESTS = ("heldout_captions", "heldout_style")
EVENLY = "random, evenly"
TRAINED: dict[str, tuple[int, ...]] = {
    "random": SIZES, EVENLY: SIZES, "at 56": (56,), "at 28": (28,), "at 14": (14,)
}  # fmt: skip


def trained(kind: Kind, at: str, seed: int, folder: Path, steps: int) -> Path:
    """The run folder of a decoder."""
    recipe = scenes()
    cfg: DenseConfig = replace(
        recipe,
        name=f"{kind}-{at.replace(' ', '-')}-{seed}-{steps}",
        out=str(OUT / "runs"),
        data=PicturesConfig(f"{folder}/train", features=str(OUT / "features" / "train")),
        vision=replace(
            recipe.vision,
            patch_sizes=TRAINED[at],
            patch_weights=(1.0,) * len(SIZES) if at == EVENLY else (),
        ),
        decoder=DecoderConfig(kind),
        eval_data=(),
        steps=steps,
        seed=seed,
        checkpoint_every=0,
    )
    if not (cfg.folder / "model").is_dir():
        begun = bool(complete_checkpoints(cfg.folder / "checkpoints"))
        train_decoder(cfg, load_dense(f"{folder}/train"), resume=begun)
    return cfg.folder


class Test:
    """A folder of scenes, its features cached."""

    def __init__(self, folder: Path, tower: VisionTower) -> None:
        self.dataset = load_dense(folder)
        self.source = PatchSource(tower, self.dataset)
        self.source.use_cache(str(OUT / "features" / folder.name), SIZES)

    @torch.no_grad()
    def miou(self, decoder: TrainedDecoder, patch_size: int) -> float:
        counter = IoUCounter(len(self.dataset.class_names))
        for rows in np.array_split(np.arange(len(self.dataset)), max(1, len(self.dataset) // 20)):
            features, masks, _ = self.source(rows, patch_size)
            logits = interpolate(decoder.decoder(features), masks.shape[1:], mode="bilinear")
            labels = logits.argmax(1).byte().cpu().numpy()
            for mask, found in zip(masks.cpu().numpy(), labels, strict=True):
                counter.add(mask, found)
        return counter.result(range(1, counter.num_classes + 1)).mean


def table(measured: dict[str, float]) -> dict[str, Any]:
    """kind -> trained at -> test -> patch size -> mean over seeds, and standard deviation.

    measured: as `values_of` finds them. What was not measured is left out.
    """
    out: dict[str, Any] = {}
    for kind in get_args(Kind):
        for at in TRAINED:
            for test in TESTS:
                for size in SIZES:
                    found = values_of(measured, kind, at, test, size)
                    if not found:
                        continue
                    spread = [float(np.std(found, ddof=1))] if len(found) > 1 else []
                    values = [round(value, 4) for value in (float(np.mean(found)), *spread)]
                    tests = out.setdefault(kind, {}).setdefault(at, {"seeds": len(found)})
                    tests.setdefault(test, {})[str(size)] = values
    return out


def values_of(measured: dict[str, float], kind: str, at: str, test: str, size: int) -> list[float]:
    """mIoU by seed; measured: by `KIND/TRAINED AT/SEED/TEST@SIZE`."""
    keys = (f"{kind}/{at}/{seed}/{test}@{size}" for seed in range(MOST_SEEDS))
    return [measured[key] for key in keys if key in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=get_args(Kind), choices=get_args(Kind))
    parser.add_argument("--trained", nargs="+", default=list(TRAINED), choices=TRAINED)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=300, help="of each folder")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    distributed.ensure_group()
    folder = build_scenes(OUT / f"scenes.{args.scenes}", args.scenes, num_classes=120, kinds=True)
    recipe = scenes().vision
    dtype = distributed.resolve_dtype(recipe.dtype)
    tower = load_vision_tower(recipe.tower, dtype=dtype, features=recipe.features)
    tower.to(distributed.device())
    file = OUT / f"measured.{args.scenes}.{args.steps}.json"
    measured: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    tests = {test: Test(folder / test, tower) for test in TESTS}
    for seed in range(args.seeds):
        for kind in args.kinds:
            for at in args.trained:
                key = f"{kind}/{at}/{seed}"
                if f"{key}/{TESTS[-1]}@{SIZES[-1]}" in measured:
                    continue
                decoder = load_decoder(trained(kind, at, seed, folder, args.steps) / "model", tower)
                decoder.decoder.to(distributed.device())
                for test, pictures in tests.items():
                    for size in SIZES:
                        measured[f"{key}/{test}@{size}"] = pictures.miou(decoder, size)
                print(key, {k: round(v, 3) for k, v in measured.items() if k.startswith(key)})
                file.write_text(json.dumps(measured, indent=1) + "\n")
    rows = table(measured)
    targets = []
    for kind in rows:
        for test in TESTS if rows[kind].keys() == TRAINED.keys() else ():
            lost = max(
                rows[kind][f"at {size}"][test][str(size)][0]
                - rows[kind]["random"][test][str(size)][0]
                for size in (56, 28, 14)
            )
            what = f"{kind}, {test}: mIoU that random patch sizes lose, at most, of one trained at"
            targets.append(Target(what, "<= 0.01", round(lost, 4)))
    figures = {"scenes": args.scenes, "steps": args.steps, "tower": recipe.tower, "rows": rows}
    finish("dense_decoders", figures, targets, packages=("torch", "timm", "deepspeed", "numpy"))


if __name__ == "__main__":
    main()
