"""Chunks of texts, ranks, ZeRO and the feature cache change nothing but the cost.

    python benchmarks/lit_equivalence.py

Gradients: a batch of 4,096 pairs in chunks of 64, by one rank and by two, against open_clip's loss
of all texts in one forward. A BERT of two layers reads them: in one shot too they must fit. In
float64 a stand-in takes the place of DeepSpeed's engine, which reduces no float64 gradients;
everything else is what trains. float32 runs under DeepSpeed at ZeRO 0 to 3.

Losses: 100 steps of MiniLM against DINOv2-S at patch 56 with features from the cache and from
pixels, float32, same seed, no augmented views. The rounding of float32 is all that differs: the
tower reads other batches when it fills the cache.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from lib.harness import Target, write_result
from lib.launcher import deepspeed
from lib.lit_setup import Size, shards, text_folder
from lit_gradients import build_model, one_shot_gradients, random_pairs, relative_error

PAIRS, CHUNK = 4096, 64
LOSSES = ("sigmoid", "softmax")
BOUNDS = {"float64": 1e-10, "float32": 1e-5}
TOWER = "dinov2s"
SMALL = Size("", 0, text_layers=2, text_width=64, batch_size=PAIRS, precisions=())
STEPS, LOSS_BOUND = 100, 1e-4


def main() -> None:
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
    write_result("lit_equivalence", figures, targets, packages=("torch", "deepspeed", "timm"))


# ---- gradients -------------------------------------------------------------------------------


def cases(stages: Iterable[int] = (0, 1, 2, 3)) -> dict[str, dict[str, Any]]:
    """Name -> loss, dtype and ZeRO stage. float64 knows no stages."""
    found = {f"{loss}-float64": {"loss": loss, "dtype": "float64", "stage": 0} for loss in LOSSES}
    for loss in LOSSES:
        for stage in stages:
            case = {"loss": loss, "dtype": "float32", "stage": stage}
            found[f"{loss}-float32-zero{stage}"] = case
    return found


def chunked_gradients(
    folder: Path, ranks: int, tower: str, text: str, todo: dict[str, dict[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> loss and gradients of a step in chunks, by that many processes."""
    folder.mkdir()
    job = {"tower": tower, "text": text, "pairs": PAIRS, "chunk": CHUNK, "cases": todo}
    (folder / "job.json").write_text(json.dumps(job))
    program = Path(__file__).with_name("lit_gradients.py")
    done = deepspeed(ranks, program, str(folder / "job.json"))
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return {name: load_file(folder / f"{name}.safetensors") for name in todo}


def one_shot(tower: str, text: str, loss: str, dtype: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of the same batch in one forward, by open_clip's loss."""
    model = build_model(tower, text, LossConfig(kind=loss), getattr(torch, dtype))
    return one_shot_gradients(model, *random_pairs(model, PAIRS))


def compare_gradients(folder: Path, tower: str, text: str) -> list[dict[str, Any]]:
    """A row per case and number of ranks."""
    whole = {(loss, d): one_shot(tower, text, loss, d) for loss in LOSSES for d in BOUNDS}
    rows = []
    for ranks in (1, 2):
        found = chunked_gradients(folder / f"ranks{ranks}", ranks, tower, text, cases())
        for name, case in cases().items():
            loss, dtype = case["loss"], case["dtype"]
            row = {"ranks": ranks, **case}
            row["to_one_shot"] = relative_error(found[name], whole[loss, dtype])
            if dtype == "float32":  # whose rounding is it?
                exact = whole[loss, "float64"]
                row["to_float64"] = relative_error(found[name], exact)
                row["one_shot_to_float64"] = relative_error(whole[loss, dtype], exact)
            print(json.dumps(row))
            rows.append(row)
    return rows


# ---- losses ----------------------------------------------------------------------------------


def losses_of(cfg: TrainConfig) -> list[float]:
    """Train; returns the loss of each step."""
    lines = (train(cfg) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def largest_difference(got: list[float], expected: list[float]) -> float:
    """The largest relative difference of the losses of one step."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def compare_losses(folder: Path, loss: str) -> dict[str, Any]:
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
