"""Closed-form initialisation: whitening and the first text projection.

The tower is locked, so its features are constants, and two things can be solved from the first few
thousand samples before any gradient step:

- The whitening of the features. A self-supervised tower spends most of its variance on a few
  directions, such as drawing style, which would dominate every cosine.
- The first text projection: the least-squares map from the untrained text tower's vectors to the
  whitened image features.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrastive import distributed
from contrastive.files.weights import read_sealed_tensors, sealed_tensors
from contrastive.image_features import FeatureSource
from contrastive.model.lit import LitModel
from contrastive.text.encoder import TextVectors
from contrastive.text.padding import TokenBatch
from contrastive.train.config import TrainConfig
from data.errors import UsageError
from data.files import write_atomically
from data.pipeline.captioned import CaptionedPipeline
from data.progress import Progress

INIT_FILE = "start.safetensors"


def closed_form_init(
    cfg: TrainConfig,
    model: LitModel,
    pipeline: CaptionedPipeline,
    source: FeatureSource,
    patch_sizes: Sequence[int],
) -> None:
    """Set the model's affine and projection from the first `cfg.init_samples` samples.

    Solved once per run, at every patch size, by all ranks together, and kept in the run's folder.
    """
    file = cfg.folder / INIT_FILE
    if not file.exists():
        moments = _collect(cfg, model, pipeline, source, patch_sizes)
        if not moments["n"]:
            raise UsageError(f"not one of the first {cfg.init_samples} samples could be read")
        if distributed.is_main():
            sums = moments["n"], moments["x"], moments["xx"]
            mean, whiten = whitening(*sums, embed_dim=model.embed_dim)
            centred = moments["yx"] - torch.outer(moments["y"], mean.double())
            projection = least_squares(moments["yy"], centred @ whiten.double())
            # as large as a random projection would be, so that one learning rate suits both
            projection *= model.text.encoder.projection.weight.std().cpu() / projection.std()
            solved = {"mean": mean, "whiten": whiten, "projection": projection.contiguous()}
            write_atomically(file, lambda out: out.write(sealed_tensors(solved)))
        distributed.barrier()
    start, _ = read_sealed_tensors(file)
    model.feature_mean.copy_(start["mean"])
    model.feature_whiten.copy_(start["whiten"])
    model.text.encoder.projection.weight.data.copy_(start["projection"])


@torch.no_grad()
def _collect(
    cfg: TrainConfig,
    model: LitModel,
    pipeline: CaptionedPipeline,
    source: FeatureSource,
    patch_sizes: Sequence[int],
) -> dict[str, Tensor]:
    """Sums over samples, of all ranks: image features x (and x x^T) over all patch sizes, text
    vectors y, y y^T, and y x^T with x the mean over patch sizes."""
    encoder, d = model.text.encoder, model.vision.embed_dim
    w = encoder.tower.width
    shapes: dict[str, tuple[int, ...]] = {"n": (), "x": (d,), "xx": (d, d)}
    shapes |= {"y": (w,), "yy": (w, w), "yx": (w, d)}
    device = distributed.device()
    sums = {
        k: torch.zeros(shape, dtype=torch.float64, device=device) for k, shape in shapes.items()
    }
    encoder.eval()
    samples = min(cfg.init_samples, pipeline.num_samples or cfg.init_samples)
    steps = -(-samples // cfg.global_batch_size)
    bar = Progress(
        pipeline.parts(0, steps), "closed-form start", steps, disable=not distributed.is_main()
    )
    for part in chain.from_iterable(bar):
        views = []
        for patch_size in patch_sizes:
            features, valid = source(part, patch_size)
            x = features.to(device)[valid.to(device)].double()
            sums["n"] += len(x)
            sums["x"] += x.sum(0)
            sums["xx"] += x.T @ x
            views.append(x)
        read = np.flatnonzero(valid.numpy()[part.caption_slots])
        if not len(read):
            continue
        images = valid.cumsum(0)[part.caption_slots[read]] - 1
        texts: TokenBatch | TextVectors
        if part.text_vectors is None:
            texts = TokenBatch.of(encoder.tower, part.tokens.take(read))
        else:
            texts = TextVectors(part.text_vectors[read])
        y = encoder.pool(texts.to(device)).double()
        sums["y"] += y.sum(0)
        sums["yy"] += y.T @ y
        sums["yx"] += y.T @ torch.stack(views).mean(0)[images.to(device)]
    encoder.train()
    return {name: distributed.all_reduce_sum(value).cpu() for name, value in sums.items()}


def whitening(
    count: Float[Tensor, ""],
    total: Float[Tensor, " d"],
    outer: Float[Tensor, "d d"],
    shrinkage: float = 0.05,
    embed_dim: int = 0,
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d e"]]:
    """Mean and whitening matrix, float32, from sums over n features in float64.

    The symmetric matrix (ZCA) where the width stays; else that of the principal components (PCA),
    the `embed_dim` largest.

    total: sum of x; outer: sum of x x^T. shrinkage: of the mean eigenvalue, added to each, so that
    directions without variance are not blown up. Kessy et al., arXiv:1512.00809.
    """
    mean = total / count
    covariance = outer / count - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    floor = shrinkage * values.mean() + torch.finfo(torch.float64).tiny
    matrix = vectors @ torch.diag((values + floor).rsqrt())
    if embed_dim in (0, len(mean)):
        return mean.float(), (matrix @ vectors.T).float()
    return mean.float(), matrix[:, -embed_dim:].float()  # eigh's values ascend


def least_squares(
    inner: Float[Tensor, "w w"], cross: Float[Tensor, "w d"], ridge: float = 0.02
) -> Float[Tensor, "d w"]:
    """The bias-free linear map from y to x, float32, from the sums of y y^T and y x^T.

    ridge: of the mean diagonal, added to it.
    """
    penalty = ridge * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    return torch.linalg.solve(inner + penalty, cross).T.float()
