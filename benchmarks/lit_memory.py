"""Peak memory of one training step against the global batch; open_clip's trainer beside it.

    python benchmarks/lit_memory.py

One process per case. Image features are random and ready in memory, and no image tower runs. Only
the case "from pixels" has one: its step also reads and decodes the default drawings, and runs
ViT-S/16 over them at patch 56 (on a GPU ViT-B/16 at 60). Texts are the default data's
captions, repeated, of at most 16 tokens, read by MiniLM-L6 (on a GPU BERT-base); linear layers in
bfloat16, weights in float32. FlexiLiT uses the micro-batch that it finds for the smallest batch.
open_clip takes its own trainer's step: one forward of all texts, or `--accum-freq` with FlexiLiT's
micro-batch, which reads each text twice and holds all logits each time.

Memory is the largest resident set of the process during the step (on a GPU, the most that torch
allocated). open_clip's larger batches are extrapolated by the polynomial through those that ran,
which grows no faster than the true memory; a case whose estimate exceeds the limit is not run.
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from contrastive import LitModel, distributed
from contrastive.image_features import FeatureSource
from contrastive.run.config import ZeroConfig
from contrastive.run.zero import batch_shape
from contrastive.train.micro_batch import find_micro_batch_size
from contrastive.train.step import TrainStep
from data.batch import Batch
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from lib.harness import Target, finish, machine
from lib.lit_setup import (
    CONTEXT,
    LOSSES,
    Loss,
    adamw,
    build_model,
    build_open_clip,
    build_step,
    build_tower,
    shards,
    size_here,
    text_folder,
)

BATCHES = (1024, 8192, 32768)
SMALLEST = 256  # pairs, measured of open_clip only, to foretell the rest
OURS, PIXELS = "FlexiLiT", "FlexiLiT from pixels"
PLAIN, ACCUMULATING = "open_clip", "open_clip accum-freq"
CASES = {OURS: LOSSES, PIXELS: LOSSES[:1], PLAIN: LOSSES, ACCUMULATING: LOSSES}
LIMIT_SHARE = 0.6  # of the machine's memory, or of the GPU's 0.95, that a case may take
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="run one case, given as JSON, in this process")
    case = parser.parse_args().case
    if case:
        print(json.dumps(run_case(**json.loads(case))))
        return
    shards()  # built once, before the processes that read them
    with tempfile.TemporaryDirectory() as folder:
        text = text_folder(size_here(), Path(folder))
        rows = [
            row
            for who, losses in CASES.items()
            for loss in losses
            for row in measure(text, who, loss)
        ]
    targets = []
    for who, loss in [(OURS, LOSSES[0]), (OURS, LOSSES[1]), (PIXELS, LOSSES[0])]:
        peaks = {row["pairs"]: row for row in rows if row["who"] == who and row["loss"] == loss}
        small, large = peaks[BATCHES[0]], peaks[BATCHES[-1]]
        ratio = (large["peak_gib"] - large["features_gib"]) / small["peak_gib"]
        what = f"{who}, {loss}: peak at {BATCHES[-1]:,} less the features / peak at {BATCHES[0]:,}"
        targets.append(Target(what, "<= 1.3", ratio))
    packages = ("torch", "deepspeed", "open_clip_torch")
    figures = {"precision": size_here().precisions[-1], "limit_gib": limit_gib(), "rows": rows}
    finish("lit_memory", figures, targets, lambda file: draw(rows, file), packages)


def measure(text: str, who: str, loss: str) -> list[dict[str, Any]]:
    """A row per batch; only the estimate where that says that the step does not fit."""
    rows: list[dict[str, Any]] = []
    seen: dict[int, float] = {}  # pairs -> GiB
    theirs = who in (PLAIN, ACCUMULATING)
    for pairs in (SMALLEST, *BATCHES) if theirs else BATCHES:
        row: dict[str, Any] = {"who": who, "loss": loss, "pairs": pairs, "fits": True}
        if theirs and seen:
            row["estimate_gib"] = foretell(seen, pairs)
            row["fits"] = row["estimate_gib"] <= limit_gib()
        if row["fits"]:
            row |= start(text=text, who=who, loss=loss, pairs=pairs)
        if row["fits"]:
            seen[pairs] = row["peak_gib"]
        elif "peak_gib" not in row and row.get("estimate_gib", 0) <= limit_gib():
            del row["estimate_gib"]  # it was tried, and ran out of memory
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def foretell(seen: Mapping[int, float], pairs: int) -> float:
    """GiB, by the polynomial through what was measured: a constant, a line, a parabola."""
    sizes, peaks = np.array(list(seen)), np.array(list(seen.values()))
    return float(np.polyval(np.polyfit(sizes, peaks, len(sizes) - 1), pairs))


def limit_gib() -> float:
    """What a case may take."""
    if torch.cuda.is_available():
        return 0.95 * torch.cuda.get_device_properties(0).total_memory / GIB
    return LIMIT_SHARE * machine()["memory_gib"]


def start(**case: Any) -> dict[str, Any]:
    """Run a case in a process of its own; `fits` False where it ran out of memory."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "out of memory" in done.stderr or "can't allocate memory" in done.stderr:
        return {"fits": False}
    raise RuntimeError(done.stderr[-3000:])


# ---- one case, in a process of its own -------------------------------------------------------


def run_case(text: str, who: str, loss: Loss, pairs: int) -> dict[str, Any]:
    """Peak memory of one step, and what was there before it."""
    size, device = size_here(), distributed.device()
    if device.type == "cpu":
        limit = int(limit_gib() * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    precision = size.precisions[-1]
    dtype = getattr(torch, precision)
    tower = build_tower(size, dtype if who == PIXELS else torch.float32)
    model = build_model(tower, text, loss)
    chunk = min(pairs, find_micro_batch_size(model, BATCHES[0], dtype))
    zero = ZeroConfig(precision=precision, micro_batch_size=chunk)
    pipeline = drawings(model, pairs, pixels=who == PIXELS)
    facts: dict[str, Any] = {"features_gib": pairs * model.embed_dim * 4 / GIB}
    if who == PIXELS:
        step: Callable[[], object] = partial(pixel_step, build_step(model, zero, pairs), pipeline)
        square = torch.zeros(1, 3, size.image_size, size.image_size, device=device)
        tower(square, size.image_size // 4)
    else:
        batch = next(pipeline.batches(0, 1))
        features = torch.randn(pairs, model.embed_dim)
    if who == OURS:
        step = partial(build_step(model, zero, pairs), batch, features, batch.valid)
    elif who != PIXELS:
        chunk = pairs if who == PLAIN else chunk
        like = TrainStep(model, None, batch_shape(pairs, chunk, 1), seed=0)
        theirs = build_open_clip(model.vision, text, like)
        images = torch.nn.functional.normalize(features, dim=-1).to(device)
        step = partial(open_clip_step, theirs, loss, images, padded(batch, device), chunk)
        del like
    del model
    facts["before_gib"] = peak_gib(anew=True)
    began = time.perf_counter()
    step()
    peak = peak_gib()
    facts["seconds"] = round(time.perf_counter() - began, 1)
    facts["texts_at_a_time"] = chunk
    return facts | {"peak_gib": peak}


def peak_gib(anew: bool = False) -> float:
    """The most memory so far. anew: forget it, and give what is in use now."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / GIB
    if anew:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from now
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / GIB


def drawings(model: LitModel, pairs: int, pixels: bool) -> CaptionedPipeline:
    """Batches of so many drawings of the default data, or of their captions alone."""
    return CaptionedPipeline(
        DataConfig(shards=shards(), num_workers=0),
        model.transform if pixels else None,
        tokenizer=model.text.encoder.tower.tokenizer,
        seed=0,
        global_batch_size=pairs,
        rank=0,
        world_size=1,
    )


def pixel_step(step: TrainStep, pipeline: CaptionedPipeline) -> None:
    """One training step from the shards on, with no cache of features."""
    tower = step.model.vision
    source = FeatureSource(tower, DataConfig(), ())
    for ready in source.ahead(pipeline.parts(0, 1), lambda _: tower.image_size // 4):
        step(*ready)


def padded(batch: Batch, device: torch.device) -> Int[Tensor, "b n"]:
    """Token ids as open_clip's trainer has them."""
    ids = torch.zeros(len(batch), CONTEXT, dtype=torch.long)
    for row, tokens in zip(ids, batch.tokens.tolist(), strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids.to(device)


def open_clip_step(
    model: torch.nn.Module,
    loss: str,
    images: Float[Tensor, "b d"],
    tokens: Int[Tensor, "b n"],
    chunk: int,
) -> None:
    """What open_clip's `train_one_epoch` does with a batch, its image tower's forward aside.

    Several chunks: their features first, without gradient; then each chunk again, against all.
    """
    contrast = SigLipLoss() if loss == "sigmoid" else ClipLoss()
    optimizer = adamw(list(model.parameters()))
    parts = tokens.split(chunk)
    dtype = getattr(torch, size_here().precisions[-1])
    autocast = partial(torch.autocast, images.device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast():
        known = [model(text=part)["text_features"] for part in parts] if len(parts) > 1 else []
    for number, part in enumerate(parts):
        with autocast():
            out = model(text=part)
            texts = torch.cat([*known[:number], out["text_features"], *known[number + 1 :]])
            value = contrast(**out | {"image_features": images, "text_features": texts})
        value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# ---- plot ------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Peak memory against the batch; a cross where a step does not fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(CASES, ("#4477aa", "#228833", "#ee6677", "#ccbb44"), strict=True))
    for (who, colour), (loss, style) in product(colours.items(), zip(LOSSES, "-:", strict=True)):
        mine = [row for row in rows if row["who"] == who and row["loss"] == loss]
        if not mine:
            continue
        ran = [(row["pairs"], row["peak_gib"]) for row in mine if row["fits"]]
        axes.plot(*zip(*ran, strict=True), f"o{style}", color=colour, label=f"{who}, {loss}")
        told = [
            (row["pairs"], row["estimate_gib"])
            for row in mine
            if not row["fits"] and "estimate_gib" in row
        ]
        if told:
            axes.plot(*zip(*told, strict=True), "x", color=colour)
    axes.axhline(limit_gib(), color="#bbbbbb", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([SMALLEST, *BATCHES], [f"{n:,}" for n in (SMALLEST, *BATCHES)])
    axes.set_xlabel("pairs per step, one process")
    axes.set_ylabel("peak memory, GiB (cross: estimate, does not fit)")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
