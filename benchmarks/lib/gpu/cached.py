"""A training step: against the text tower's own best step, and open_clip's with a locked tower."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contrastive import distributed
from contrastive.image_features import FeatureSource, full_batch
from contrastive.run.config import ZeroConfig
from contrastive.text_features import fill_texts
from contrastive.train.micro_batch import compile_texts, find_micro_batch_size
from contrastive.train.step import TrainStep
from contrastive.vision.tower import VisionTower
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from lib.gpu.data import captions, context, image_tower, tars, text_folder
from lib.gpu.open_clip_steps import OpenClip
from lib.gpu.results import Measured
from lib.gpu.scale import CUDA, DEVICE, DTYPE, Scale, TextShape
from lib.gpu.text_steps import best_text_step
from lib.harness import Target, interleave
from lib.lit_setup import build_model, build_step

STEPS = 1_000_000  # more than any run here takes
AHEAD = 4  # batches that workers may have ready before a clock starts
PRECISION: Any = "bfloat16" if CUDA else "float32"


class Training:
    """This project's training, as `launch/lit.py` puts it together."""

    def __init__(
        self,
        scale: Scale,
        folder: Path,
        shape: TextShape,
        mean_tokens: int,
        batch: int,
        cached: bool,
    ) -> None:
        distributed.ensure_group()
        self.batch, self.mean_tokens = batch, mean_tokens
        self.text = text_folder(shape, scale.vocabulary, folder / f"bert{shape.width}")
        self.tower: VisionTower = image_tower(scale)
        self.model = build_model(self.tower, self.text, context=context(mean_tokens))
        micro = min(batch, 16) if scale.tiny else 0
        self.chunk = micro or find_micro_batch_size(self.model, batch, DTYPE)
        zero = ZeroConfig(precision=PRECISION, micro_batch_size=self.chunk)
        self.step: TrainStep = build_step(self.model, zero, batch)
        self.compiled = compile_texts(self.model, self.chunk, DTYPE)
        shards = tars(folder / f"tars{mean_tokens}", scale, mean_tokens)
        features = str(folder / f"features{mean_tokens}") if cached else ""
        self.cfg = DataConfig(shards=shards, features=features, num_workers=scale.workers)
        coarsest = scale.patch_sizes[:1]  # a cached step costs the same at every patch size
        self.source = FeatureSource(self.tower, self.cfg, coarsest)
        self.tokenizer = self.model.text.encoder.tower.tokenizer
        if cached:
            fill_texts(self.cfg, self.tokenizer)
        self.draw: Callable[[int], int] = lambda step: coarsest[0]
        self.arrivals: Iterator[Any] = iter(())
        self.restart()

    def restart(self) -> None:
        """Begin the data again, with the patch sizes that `draw` now gives."""
        pipeline = CaptionedPipeline(
            self.cfg,
            None if self.cfg.features else self.model.transform,
            tokenizer=self.tokenizer,
            seed=0,
            global_batch_size=self.batch,
            rank=0,
            world_size=1,
        )
        self.arrivals = self.source.ahead(pipeline.steps(0, STEPS), lambda step: self.draw(step))

    def __call__(self) -> None:
        self.step(*next(self.arrivals))


def cached(
    scale: Scale, folder: Path, mean_tokens: int, shape: TextShape, batch: int
) -> tuple[dict[str, Any], dict[str, float], Training]:
    """Figures and medians of the cached step and the text tower's own."""
    training = Training(scale, folder, shape, mean_tokens, batch, cached=True)
    texts = captions(batch, mean_tokens, scale.vocabulary, seed=1)
    ids = [list(text) for text in training.tokenizer(texts)]
    text_step, ways = best_text_step(training.text, ids, training.chunk, max(2, scale.rounds // 2))
    timings = interleave({"cached": training, "text": text_step}, scale.rounds, warmup=2)
    pairs = {name: batch / timings.median(name) for name in timings.seconds}
    figures = {
        "batch": batch,
        "texts_at_a_time": training.chunk,
        "texts_compiled": training.compiled,
        "mean_tokens": sum(map(len, ids)) / batch,
        "text_tower": ways,
        "pairs_per_s": pairs,
        "times": timings.figures(),
    }
    return figures, pairs, training


def against_open_clip(scale: Scale, folder: Path, mean_tokens: int, wanted: str) -> Measured:
    """Captions of so many tokens on average, BERT-base."""
    figures, pairs, training = cached(scale, folder, mean_tokens, scale.text, scale.batch)
    theirs = OpenClip(scale, training.tower, training.text, mean_tokens)
    times = interleave({"open_clip": partial(theirs.step, *theirs.ready())}, scale.rounds, warmup=2)
    pairs["open_clip, locked"] = scale.open_clip_batch / times.median("open_clip")
    figures["times"] |= times.figures()
    figures["open_clip, from its own loader"] = theirs.from_its_loader(training.cfg.shards)
    about = f"{mean_tokens} tokens, batch {scale.batch:,}"
    own = pairs["cached"] / pairs["text"]
    over = pairs["cached"] / pairs["open_clip, locked"]
    return figures, [
        Target(f"cached step over the text tower's own best, {about}", ">= 0.95", own),
        Target(f"cached step over open_clip's locked step, {about}", wanted, over),
    ]


def tokens_22(scale: Scale, folder: Path) -> Measured:
    return against_open_clip(scale, folder, 22, ">= 4")


def tokens_7(scale: Scale, folder: Path) -> Measured:
    return against_open_clip(scale, folder, 7, ">= 8")


def minilm(scale: Scale, folder: Path) -> Measured:
    figures, pairs, _ = cached(scale, folder, 16, scale.minilm, scale.minilm_batch)
    what = f"pairs/s, MiniLM-L6, 16 tokens, batch {scale.minilm_batch:,}"
    return figures, [Target(what, ">= 100000", pairs["cached"])]


def uncached(scale: Scale, folder: Path) -> Measured:
    """From JPEGs: at patch 16, and at random patch sizes, against the parts one after the other."""
    training = Training(scale, folder, scale.text, 22, scale.pixel_batch, cached=False)
    sizes = scale.patch_sizes
    counts = {size: full_batch(training.tower.num_tokens(size), DEVICE) for size in sizes}
    side, rounds = scale.image_size, max(2, scale.rounds // 2)
    pixels = torch.rand(max(counts.values()), 3, side, side, device=DEVICE)
    forwards: dict[str, Callable[[], object]] = {}
    for size in sizes:
        forwards[f"forward {size}"] = partial(training.tower, pixels[: counts[size]], size)
    with torch.no_grad():
        forward = interleave(forwards, rounds, warmup=1)
    del pixels, forwards
    images = {s: scale.pixel_batch / counts[s] * forward.median(f"forward {s}") for s in sizes}
    ready = next(training.arrivals)
    text = interleave({"text": lambda: training.step(*ready)}, rounds, warmup=1)
    found, figures = {}, {"batch": scale.pixel_batch, "times": forward.figures() | text.figures()}
    draws: dict[str, Callable[[int], int]] = {
        "patch 16": lambda step: 16,
        "random": lambda step: sizes[step % len(sizes)],
    }
    for name, draw in draws.items():
        training.draw = draw
        training.restart()
        steps = (1 if scale.tiny else 3) * len(sizes)  # each size as often as any other
        times = interleave({name: training}, steps, warmup=AHEAD)
        found[name] = sum(times.seconds[name]) / len(times.seconds[name])
        figures["times"] |= times.figures()  # type: ignore[operator]
    after = {
        "patch 16": images[16] + text.median("text"),
        "random": sum(images.values()) / len(sizes) + text.median("text"),
    }
    figures["pairs_per_s"] = {name: scale.pixel_batch / seconds for name, seconds in found.items()}
    figures["one_after_the_other_s"] = after
    return figures, [
        Target(
            f"uncached, {name}, over forward and text step one after the other",
            ">= 0.9",
            after[name] / found[name],
        )
        for name in found
    ]
