"""A training step against open_clip's with `lock_image_tower`: same towers, images and captions.

    python benchmarks/lit_throughput.py

open_clip finds its pixels and tokens ready in memory; FlexiLiT reads features and tokens from the
cache, through its own pipeline. `text` is the bare text tower on ready tensors (forward, backward,
AdamW): an upper bound for any trainer of that tower.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from open_clip.loss import SigLipLoss

from contrastive import distributed
from contrastive.distributed import synchronize
from contrastive.image_features import FeatureSource
from contrastive.model.loss import Positives, loss_share
from contrastive.run.config import ZeroConfig
from contrastive.text.encoder import TextVectors
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import PaddedTokens, TokenBatch
from contrastive.text_features import fill_texts
from contrastive.train.step import TrainStep
from data.batch import Batch
from data.captions import Tokenizer
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from data.token_ids import TokenIds
from lib.harness import Target, Timings, finish, interleave
from lib.lit_setup import (
    CONTEXT,
    Precision,
    adamw,
    build_open_clip,
    build_ours,
    build_tower,
    ready_batch,
    shards,
    size_here,
    text_folder,
)

SIZE = size_here()
RANDOM_SIZES = (56, 32, 28, 16, 14) if SIZE.image_size == 224 else (48, 40, 30, 24, 20, 16, 15)
STEPS = 10_000_000  # more than any run here takes


class Trainer:
    """All contenders at one precision."""

    def __init__(self, precision: Precision, text: str, features: str) -> None:
        dtype = getattr(torch, precision)
        self.device = distributed.device()
        self.tower = build_tower(SIZE, dtype)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=precision != "float32")
        zero = ZeroConfig(precision=precision)
        self.ours = build_ours(self.tower, text, zero=zero, batch_size=SIZE.batch_size)
        self.theirs = build_open_clip(build_tower(SIZE, torch.float32), text, self.ours)
        self.bare = build_ours(self.tower, text, batch_size=SIZE.batch_size).model.text.encoder
        self.cfg = DataConfig(shards=shards(), features=features, num_workers=1)
        # a cached step costs the same at every patch size, the coarsest is filled soonest
        self.source = FeatureSource(self.tower, self.cfg, RANDOM_SIZES[:1])
        tokenizer = self.bare.tower.tokenizer
        fill_texts(self.cfg, tokenizer)
        self.cached = self.source.ahead(self._steps(tokenizer), lambda _: RANDOM_SIZES[0])
        self.ready = ready_batch(SIZE, next(self.cached)[0].tokens)
        if self.device.type == "cuda":
            self.ready = self.ready.pin_memory()
        assert self.ready.images is not None
        self.images = self.tower.transform.normalise(self.ready.images.to(self.device))
        with padded(self.ours):
            self.tokens = self.ours.model.text.encoder.tower.pad(self.ready.tokens).to(self.device)
        self.pixels = FeatureSource(self.tower, DataConfig(), ())

    def _steps(self, tokenizer: Tokenizer) -> Iterator[Iterator[Batch]]:
        pipeline = CaptionedPipeline(
            self.cfg,
            None,
            tokenizer=tokenizer,
            seed=0,
            global_batch_size=SIZE.batch_size,
            rank=0,
            world_size=1,
        )
        return pipeline.steps(0, STEPS)

    # ---- ours ------------------------------------------------------------------------------

    def ours_cached(self) -> None:
        self.ours(*next(self.cached))

    def ours_cached_padded(self) -> None:
        with padded(self.ours):
            self.ours_cached()

    def ours_uncached(self, patch_size: int = 16) -> None:
        with padded(self.ours):
            features, valid = self.pixels(self.ready, patch_size)
            self.ours(self.ready, features, valid)

    def ours_uncached_random(self) -> None:
        """One step at each patch size: what random ones cost on average, times their number."""
        for patch_size in RANDOM_SIZES:
            self.ours_uncached(patch_size)

    # ---- theirs ----------------------------------------------------------------------------

    def open_clip(self) -> Callable[[], None]:
        optimizer = adamw(list(self.theirs.parameters()))
        loss_of = SigLipLoss()
        tokens = self.tokens.ids

        def step() -> None:
            optimizer.zero_grad()
            with self.autocast:
                out = self.theirs(self.images, tokens)
                loss = loss_of(**out)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), 1.0)
            optimizer.step()

        return step

    def text(self, trimmed: bool = False) -> Callable[[], None]:
        """trimmed: as ours reads them; else padded to the context length."""
        optimizer = adamw(list(self.bare.parameters()))
        tokens: TokenBatch | PackedTokens | TextVectors = TokenBatch(
            (self.tokens,), SIZE.batch_size
        )
        if trimmed:
            tokens = self.ours.split_texts(self.ready, self.ready.valid)[0].tokens
        images = torch.nn.functional.normalize(
            torch.randn(SIZE.batch_size, self.tower.embed_dim, device=self.device), dim=-1
        )

        def step() -> None:
            optimizer.zero_grad()
            with self.autocast:
                embeds = self.bare(tokens)
            (embeds * images).sum().backward()
            optimizer.step()

        return step


@contextmanager
def padded(step: TrainStep) -> Iterator[None]:
    """Within this context our texts are padded to the context length, as open_clip's are."""
    tower: Any = step.model.text.encoder.tower
    pad, filler = tower.pad, TokenIds.of([[0] * CONTEXT])

    def pad_all(ids: TokenIds) -> PaddedTokens:
        tokens = pad(TokenIds.join([ids, filler]))  # one text of full length widens all
        return PaddedTokens(tokens.ids[:-1], tokens.mask[:-1])

    packed = step.packed
    tower.pad, step.packed = pad_all, False
    step.max_groups = 1  # texts of one length are read together
    yield
    del tower.pad, step.max_groups
    step.packed = packed


def where_the_time_goes(trainer: Trainer, repeats: int) -> dict[str, float]:
    """Seconds of one cached step at 16 tokens, by part; medians."""
    step, cached = trainer.ours, trainer.cached
    engine = step.engine
    parts: dict[str, list[float]] = defaultdict(list)

    class Probe:
        def __call__(self, *args: Any) -> Any:
            return timed("text forward", lambda: engine(*args))

        def backward(self, loss: torch.Tensor) -> None:
            timed("backward", lambda: engine.backward(loss))

        def step(self) -> None:
            timed("optimiser", engine.step)

    def timed(name: str, fn: Callable[[], Any]) -> Any:
        synchronize()
        start = time.perf_counter()
        out = fn()
        synchronize()
        parts[name].append(time.perf_counter() - start)
        return out

    def ready() -> Iterator[Any]:
        while True:
            yield timed("wait for the batch", lambda: next(cached))

    with patch.object(step, "engine", Probe()), patch.object(trainer, "cached", ready()):
        for _ in range(repeats):
            timed("whole step", trainer.ours_cached_padded)
    return {name: sorted(values)[len(values) // 2] for name, values in parts.items()}


def check_same_loss(trainer: Trainer) -> float:
    """Both trainers give the same loss before the first step; returns the relative difference."""
    model, pixels = trainer.ours.model, trainer.images
    with torch.no_grad():
        features, _ = trainer.pixels(trainer.ready, 16)
        images = model.embed_features(features.to(trainer.device))
        pairs = torch.arange(len(images), device=trainer.device)
        tokens = TokenBatch((trainer.tokens,), SIZE.batch_size)
        with trainer.autocast:
            theirs = float(SigLipLoss()(**trainer.theirs(pixels, trainer.tokens.ids)))
            embeds, scale, bias = model.text(tokens)
            kind = model.text.loss.kind
            ours = float(loss_share(kind, images, embeds, Positives(pairs, pairs), scale, bias))
    difference = abs(ours - theirs) / abs(theirs)
    assert difference < 1e-2, (ours, theirs)
    return difference


def plot(figures: dict, file: Path) -> None:
    fig, axes = plt.subplots(1, len(figures), figsize=(5 * len(figures), 3.2), squeeze=False)
    for axis, (precision, values) in zip(axes[0], figures.items(), strict=True):
        speeds = values["pairs_per_s"]
        axis.barh(list(speeds)[::-1], list(speeds.values())[::-1], color="#3f6ea3")
        axis.bar_label(axis.containers[0], fmt="%.0f", padding=2)
        axis.set_xlabel("pairs/s")
        axis.set_title(precision)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; twice as many cached")
    args = parser.parse_args()
    figures: dict[str, dict] = {}
    for precision in SIZE.precisions:
        with tempfile.TemporaryDirectory() as folder:
            text = text_folder(SIZE, Path(folder) / "text")
            trainer = Trainer(precision, text, f"{folder}/features")
            figures[precision] = measure(trainer, args.rounds)
    finish(
        "lit_throughput",
        figures,
        targets(figures),
        plot=lambda file: plot(figures, file),
        packages=("torch", "timm", "transformers", "open-clip-torch", "deepspeed"),
    )


def measure(trainer: Trainer, rounds: int) -> dict:
    """All contenders in turn: the fast ones two more times a round."""
    open_clip, text = trainer.open_clip(), trainer.text()
    difference = check_same_loss(trainer)
    slow = interleave(
        {
            "open_clip": open_clip,
            "FlexiLiT, cached, 16 tokens": trainer.ours_cached_padded,
            "FlexiLiT, cached, trimmed": trainer.ours_cached,
            "text tower alone": text,
            "text tower alone, trimmed": trainer.text(trimmed=True),
            "FlexiLiT, uncached": trainer.ours_uncached,
        },
        rounds,
        warmup=1,
    )
    fast = interleave({"text": text, "padded": trainer.ours_cached_padded}, 3 * rounds, warmup=1)
    mixed = interleave({"random": trainer.ours_uncached_random}, max(1, rounds // 2), warmup=0)
    pairs = {name: SIZE.batch_size / slow.median(name) for name in slow.seconds}
    random = len(RANDOM_SIZES) * SIZE.batch_size / mixed.median("random")
    pairs["FlexiLiT, uncached, random patch sizes"] = random
    tokens = [trainer.tower.num_tokens(size) for size in RANDOM_SIZES]
    return {
        "batch_size": SIZE.batch_size,
        "vision": SIZE.vision,
        "loss_difference": difference,
        "pairs_per_s": pairs,
        "times": slow.figures() | fast.figures() | mixed.figures(),
        "ratios": _ratios(slow) | {"text / padded": fast.ratio("text", "padded")},
        "random_over_open_clip": random / pairs["open_clip"],
        "random_patch_sizes": RANDOM_SIZES,
        "tokens_at_16_over_mean_of_random": trainer.tower.num_tokens(16)
        * len(tokens)
        / sum(tokens),
        "mean_tokens_of_captions": float(trainer.ready.tokens.lengths.mean()),
        "step_parts_s": where_the_time_goes(trainer, rounds),
    }


def _ratios(timings: Timings) -> dict[str, list[float] | float]:
    """open_clip's time over each contender's: of medians, and the quartiles within rounds."""
    out: dict[str, list[float] | float] = {}
    for name in timings.seconds:
        rounds = sorted(timings.round_ratios("open_clip", name))
        out[name] = timings.ratio("open_clip", name)
        out[f"{name}, rounds"] = [round(r, 3) for r in rounds]
    return out


def targets(figures: dict[str, dict]) -> list[Target]:
    """Targets checked on CPU."""
    if "float32" not in figures:
        return []
    found = []
    wanted = {"float32": ">= 10", "bfloat16": ">= 8"}
    for precision, values in figures.items():
        ratios = values["ratios"]
        cached = ratios["FlexiLiT, cached, 16 tokens"]
        found.append(Target(f"cached over open_clip, {precision}", wanted[precision], cached))
        what = f"cached step's speed over the text tower's alone, {precision}"
        found.append(Target(what, ">= 0.9", ratios["text / padded"]))
        uncached = ratios["FlexiLiT, uncached"]
        found.append(Target(f"uncached over open_clip, {precision}", ">= 1", uncached))
        found.append(
            Target(
                f"uncached at random patch sizes over open_clip, {precision}",
                f">= {0.9 * values['tokens_at_16_over_mean_of_random']:.2f}",
                values["random_over_open_clip"],
            )
        )
    last = SIZE.precisions[-1]
    trimmed = figures[last]["ratios"]["FlexiLiT, cached, trimmed"]
    found.append(Target(f"cached, trimmed texts, over open_clip, {last}", ">= 12", trimmed))
    return found


if __name__ == "__main__":
    main()
