"""Memory of a step against the batch, a million pairs on one GPU, and others' locked losses."""

import contextlib
import gc
import importlib.util
import resource
import sys
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from contrastive import distributed
from contrastive.model.loss import Positives, logsumexps, loss_share
from contrastive.run.config import ZeroConfig
from contrastive.text_features import fill_texts
from contrastive.train.micro_batch import find_micro_batch_size
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from lib.gpu.cached import PRECISION
from lib.gpu.data import context, image_tower, tars, text_folder
from lib.gpu.results import Measured
from lib.gpu.scale import CUDA, DEVICE, DTYPE, Scale, autocast
from lib.harness import Target, interleave
from lib.lit_setup import build_model, build_step

GIB = 2**30
CHUNK = 4_096  # texts of a loss at a time


def peak_gib(anew: bool = False) -> float:
    """The most memory that torch took; of a CPU, the process. anew: since now, without what
    earlier steps left behind."""
    if anew:
        gc.collect()  # an engine of DeepSpeed refers to itself
    if not CUDA:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)
    torch.cuda.synchronize()
    if anew:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / GIB


def _steps(scale: Scale, folder: Path, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """One step of BERT-base from random image features, at each batch, with the micro-batch that
    the smallest is found to need."""
    distributed.ensure_group()
    text = text_folder(scale.text, scale.vocabulary, folder / f"bert{scale.text.width}")
    tower = image_tower(scale)
    shards = tars(folder / "tars22", scale, 22)
    rows: list[dict[str, Any]] = []
    chunk = 0
    for pairs in batches:
        model = build_model(tower, text, context=context(22))
        smallest = scale.memory_batches[0]
        chunk = chunk or (smallest if scale.tiny else find_micro_batch_size(model, smallest, DTYPE))
        zero = ZeroConfig(precision=PRECISION, micro_batch_size=min(chunk, pairs))
        step = build_step(model, zero, pairs)
        tokenizer = model.text.encoder.tower.tokenizer
        cached = str(folder / "captions")
        cfg = DataConfig(shards=shards, features=cached, num_workers=scale.workers)
        fill_texts(cfg, tokenizer)
        pipeline = CaptionedPipeline(
            cfg, None, tokenizer=tokenizer, seed=0, global_batch_size=pairs, rank=0, world_size=1
        )
        batch = next(iter(pipeline.batches(0, 1)))
        features = torch.randn(pairs, tower.embed_dim)
        peak_gib(anew=True)
        seconds = []
        for _ in range(2):  # the first takes the optimiser's state
            start = time.perf_counter()
            step(batch, features, batch.valid)
            peak = peak_gib()
            seconds.append(time.perf_counter() - start)
        rows.append(
            {"pairs": pairs, "texts_at_a_time": zero.micro_batch_size, "peak_gib": peak,
             "features_gib": pairs * tower.embed_dim * 4 / GIB, "seconds": seconds[-1]}
        )  # fmt: skip
        print(rows[-1], flush=True)
        del model, step, features
    return rows


def memory(scale: Scale, folder: Path) -> Measured:
    small, large, _ = scale.memory_batches
    rows = _steps(scale, folder, (small, large))
    ratio = (rows[1]["peak_gib"] - rows[1]["features_gib"]) / rows[0]["peak_gib"]
    what = f"peak memory at {large:,} pairs, less the features, over that at {small:,}"
    return {"steps": rows}, [Target(what, "<= 1.3", ratio)]


def million(scale: Scale, folder: Path) -> Measured:
    """A million pairs on one GPU: the loss alone, forward and backward, of embeddings of width 512
    that are ready, texts in blocks; and a whole step of BERT-base."""
    pairs, width = scale.memory_batches[-1], scale.embed_width
    images = F.normalize(torch.randn(pairs, width, device=DEVICE), dim=-1)
    texts = F.normalize(torch.randn(pairs, width, device=DEVICE), dim=-1)
    peak_gib(anew=True)
    start = time.perf_counter()
    chunk = min(1_024, pairs)
    loss = _own_loss("sigmoid", images, texts, chunk)
    peak = peak_gib()
    figures = {
        "pairs": pairs,
        "width": width,
        "texts_at_a_time": chunk,
        "seconds": time.perf_counter() - start,
        "peak_gib": peak,
        "loss": loss,
    }
    del images, texts
    try:
        return {"loss_alone": figures, "steps": _steps(scale, folder, (pairs,))}, []
    except torch.OutOfMemoryError as error:
        return {"loss_alone": figures, "steps": f"not run: {str(error)[:160]}"}, []


def _own_loss(kind: Any, images: torch.Tensor, texts: torch.Tensor, chunk: int) -> float:
    """This project's loss and its gradients, texts in blocks as a training step takes them: for
    softmax twice, first for the sums."""
    scale = torch.tensor(10.0, device=DEVICE, requires_grad=True)
    bias = torch.tensor(-10.0, device=DEVICE, requires_grad=True)
    total = torch.zeros((), device=DEVICE)
    held = images.to(DTYPE) if CUDA else images  # as a training step holds them
    rows = torch.arange(len(images), device=DEVICE)
    blocks = texts.detach().split(chunk)
    known: list[Any] = [None] * len(blocks)
    if kind == "softmax":
        over_texts, over_images = zip(*(logsumexps(held, b, scale) for b in blocks), strict=True)
        of_images = reduce(torch.logaddexp, over_texts)
        known = [(of_images, of_block) for of_block in over_images]
    for block, own, lse in zip(blocks, rows.split(chunk), known, strict=True):
        part = block.detach().requires_grad_()  # its gradient goes with it
        share = loss_share(kind, held, part, Positives(rows, own), scale, bias, lse)
        share.backward()
        total += share.detach()
    return float(total)


def losses(scale: Scale, folder: Path) -> Measured:
    """Locked losses side by side: forward and backward over embeddings that are ready.

    Ours: texts in blocks; softmax both ways. memeff: LiT's softmax loss in Triton kernels, from
    texts to images alone. inf-cl: CLIP's, the same way alone. open_clip: all logits at once.
    """
    pairs, width = scale.memory_batches[1], scale.embed_width
    images = F.normalize(torch.randn(pairs, width, device=DEVICE), dim=-1)
    texts = F.normalize(torch.randn(pairs, width, device=DEVICE), dim=-1)
    contenders: dict[str, Callable[[], object]] = {
        "FlexiLiT, sigmoid": lambda: _own_loss("sigmoid", images, texts, min(CHUNK, pairs)),
        "FlexiLiT, softmax": lambda: _own_loss("softmax", images, texts, min(CHUNK, pairs)),
        "open_clip, sigmoid": lambda: _theirs(images, texts),
    }
    said: dict[str, Any] = {"pairs": pairs, "width": width}
    for package, module, make in (("memeff", "memeff", _memeff), ("inf-cl", "inf_cl", _inf_cl)):
        if importlib.util.find_spec(module) is None or not CUDA:
            said[package] = "not installed" if CUDA else "needs a GPU"
        else:
            contenders[package] = partial(make, images, texts)
    for name in list(contenders):
        peak_gib(anew=True)
        try:
            contenders[name]()
            said[f"{name}, peak GiB"] = peak_gib()
        except Exception as error:  # no memory for all logits, a kernel that does not compile
            said[name] = f"not run: {type(error).__name__}: {str(error)[:160]}"
            del contenders[name]
        with contextlib.suppress(RuntimeError):
            peak_gib(anew=True)
    timings = interleave(contenders, scale.rounds, warmup=1)
    ms = {name: 1e3 * timings.median(name) for name in contenders}
    return {**said, "ms": ms, "times": timings.figures()}, []


def _theirs(images: torch.Tensor, texts: torch.Tensor) -> None:
    from open_clip.loss import SigLipLoss

    own = texts.detach().requires_grad_()
    scale, bias = torch.tensor(10.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)
    with autocast():
        loss = SigLipLoss()(images, own, logit_scale=scale, logit_bias=bias)
    loss.backward()


def _memeff(images: torch.Tensor, texts: torch.Tensor) -> None:
    import memeff

    own = texts.to(DTYPE).detach().requires_grad_()
    loss = memeff.MemoryEfficientLiTLoss(temperature=0.1, normalized_inputs=True)
    loss(own, images.to(DTYPE)).backward()


def _inf_cl(images: torch.Tensor, texts: torch.Tensor) -> None:
    import inf_cl

    own = texts.detach().requires_grad_()
    inf_cl.cal_flash_loss(own, images, scale=10.0).mean().backward()  # it gives each row's
