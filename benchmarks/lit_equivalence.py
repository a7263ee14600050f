"""Micro-batches, ranks, ZeRO and the feature cache change the cost of training, not its results.

    python benchmarks/lit_equivalence.py

Gradients: a batch of 4,096 pairs in micro-batches of 64, by one rank and by two, against
open_clip's loss of all texts in one forward. The text tower is a BERT of two layers, so that the
one forward fits the memory. In float64 a stand-in takes the place of DeepSpeed's engine, which
reduces no float64 gradients; all other code is that of training. float32 runs under DeepSpeed at
ZeRO 0 to 3. All of it on the CPU.

Losses: 100 steps of MiniLM against DINOv2-S at patch 56, with features from the cache and from
pixels, float32, same seed, no augmented views. They may differ by float32 rounding alone: the tower
reads batches of another size when it fills the cache.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from lib.harness import Target, finish
from lib.lit_setup import LOSSES, Loss, Size, launch, shards, text_folder

PROGRAM = Path(__file__).resolve().parent.parent / "tests" / "gradients_program.py"
PAIRS, CHUNK = 4096, 64
BOUNDS = {"float64": 1e-10, "float32": 1e-5}
TOWER = "dinov2s"
SMALL = Size("", 0, text_layers=2, text_width=64, batch_size=PAIRS, precisions=())
STEPS, LOSS_BOUND = 100, 1e-4


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks need not have a GPU each
    with tempfile.TemporaryDirectory() as folder:
        gradients = compare_gradients(Path(folder), TOWER, f"hf:{text_folder(SMALL, Path(folder))}")
        losses = {loss: compare_losses(Path(folder), loss) for loss in LOSSES}
    targets = []
    for dtype, bound in BOUNDS.items():
        worst = max(row["to_one_shot"] for row in gradients if row["dtype"] == dtype)
        what = f"gradients at {PAIRS:,} in chunks of {CHUNK}, {dtype}, largest relative difference"
        targets.append(Target(what, f"<= {bound}", worst))
    for loss, row in losses.items():
        what = f"{loss} loss of {STEPS} steps with and without the cache, largest difference"
        targets.append(Target(what, f"<= {LOSS_BOUND}", row["largest_relative_difference"]))
    figures = {"pairs": PAIRS, "chunk": CHUNK, "gradients": gradients, "cache": losses}
    finish(
        "lit_equivalence", figures, targets, packages=("torch", "deepspeed", "timm"), where="cpu"
    )


# ---- gradients -------------------------------------------------------------------------------


def cases() -> dict[str, dict[str, Any]]:
    """Name -> loss, dtype and ZeRO stage. float64 knows no stages."""
    stages = [("float64", 0), *(("float32", stage) for stage in range(4))]
    return {
        f"{loss}-{dtype}-zero{stage}": {"loss": loss, "dtype": dtype, "stage": stage}
        for loss in LOSSES
        for dtype, stage in stages
    }


def compare_gradients(folder: Path, tower: str, text: str) -> list[dict[str, Any]]:
    """A row per case and number of ranks: relative differences to one shot."""
    job = {
        "tower": tower,
        "text": text,
        "pairs": PAIRS,
        "micro_batch_size": CHUNK,
        "cases": cases(),
    }
    (folder / "job.json").write_text(json.dumps(job))
    rows = []
    for ranks in (1, 2):
        launch(ranks, PROGRAM, folder / "job.json")
        rows += json.loads((folder / "rows.json").read_text()).values()
    for row in rows:
        print(json.dumps(row))
    return rows


# ---- losses ----------------------------------------------------------------------------------


def losses_of(cfg: TrainConfig) -> list[float]:
    """Train; returns the loss of each step."""
    lines = (train(cfg) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def largest_difference(got: list[float], expected: list[float]) -> float:
    """The largest relative difference of the losses of one step."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def compare_losses(folder: Path, loss: Loss) -> dict[str, Any]:
    """The same training from the cache and from pixels."""

    def losses(features: str) -> list[float]:
        cfg = TrainConfig(
            name=f"{loss}-{'cached' if features else 'pixels'}",
            out=str(folder),
            data=DataConfig(shards=shards(), features=features),
            vision=VisionConfig(tower=TOWER, patch_sizes=(56,)),
            text=TextConfig(context_length=16),
            loss=LossConfig(kind=loss),
            optim=OptimConfig(lr=2e-4, warmup_steps=10),
            global_batch_size=32,
            steps=STEPS,
            log_every=1,
        )
        return losses_of(cfg)

    pixels, cached = losses(""), losses(str(folder / "features"))
    return {
        "steps": STEPS,
        "first_loss": pixels[0],
        "last_loss": pixels[-1],
        "last_loss_cached": cached[-1],
        "largest_relative_difference": largest_difference(cached, pixels),
    }


if __name__ == "__main__":
    main()
