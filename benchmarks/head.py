"""What an image head costs: cached training steps with a head over steps without.

    python benchmarks/head.py

The same texts and cached features in memory; contenders run in turn.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive.run.config import ZeroConfig
from contrastive.vision.config import Head
from data.token_ids import TokenIds
from lib.harness import Target, finish, interleave
from lib.lit_setup import (
    Loss,
    Precision,
    build_model,
    build_step,
    build_tower,
    ready_batch,
    size_here,
    text_folder,
)

SIZE = size_here()
BATCH = SIZE.batch_size // 2  # on CPUs the demo's
HEADS: tuple[Head, ...] = ("none", "linear", "mlp")
CASES: tuple[tuple[Loss, int], ...] = (("softmax", 1), ("sigmoid", 4))
TOKENS = (4, 10)  # of a text; the default captions have 7 on average
VOCABULARY = (1000, 30_000)  # whole words of MiniLM


def contenders(precision: Precision, text: str) -> dict[str, Callable[[], object]]:
    """A step for each head, loss and number of micro-batches."""
    tower = build_tower(SIZE, getattr(torch, precision))
    found: dict[str, Callable[[], object]] = {}
    rng = np.random.default_rng(0)
    lengths = rng.integers(*TOKENS, BATCH, endpoint=True)
    texts = TokenIds.of([rng.integers(*VOCABULARY, length).tolist() for length in lengths])
    batch = ready_batch(None, texts)
    features = torch.randn(BATCH, tower.embed_dim)
    for loss, parts in CASES:
        for head in HEADS:
            model = build_model(tower, text, loss, head=head)
            zero = ZeroConfig(precision=precision, micro_batch_size=BATCH // parts)
            step = build_step(model, zero, BATCH)
            name = f"{loss}, micro-batches: {parts}, {head}"
            found[name] = partial(step, batch, features, batch.valid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    targets = []
    for precision in SIZE.precisions:
        with tempfile.TemporaryDirectory() as folder:
            steps = contenders(precision, text_folder(SIZE, Path(folder) / "text"))
            timings = interleave(steps, args.rounds, warmup=1)
        ratios: dict[str, list[float] | float] = {}
        for name in steps:
            base = f"{name.rpartition(', ')[0]}, none"
            ratios[name] = timings.ratio(base, name)
            ratios[f"{name}, rounds"] = sorted(timings.round_ratios(base, name))
            if name.endswith("mlp"):
                what = f"speed of a cached step, {precision}, {name}, over none"
                targets.append(Target(what, ">= 0.8", timings.ratio(base, name)))
        print(precision, {k: v for k, v in ratios.items() if not k.endswith("rounds")}, flush=True)
        figures[precision] = {"times": timings.figures(), "speed_over_none": ratios}
    finish("head", {"batch_size": BATCH, **figures}, targets)


if __name__ == "__main__":
    main()
