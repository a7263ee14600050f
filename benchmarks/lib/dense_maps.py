"""Maps of scenes from one pass of the tower, for every model of benchmarks/dense.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from contrastive import load_vision_tower
from contrastive.vision.patch_features import patch_features
from contrastive.vision.select_features import select_features
from data.dense.dense_dataset import DenseDataset
from data.dense.picture import IGNORED
from lib.alignment_rows import TOWER
from retrieval import ZeroShotSegmenter, load_dense
from retrieval.dense.miou import IoUCounter

JOINED = "cls+mean+mean@10"
"""Its patches hold the whole image's class token, then the patches after the last norm, which a
class token's model reads in its place, then those after block 10."""
PARTS = {"own": (1,), "cls+mean": (0, 1), "mean@10": (2,)}
"""Expression of a model's features -> the parts of `JOINED` that its map reads."""
NUM_QUANTILES = 19


@dataclass
class Scenes:
    """A folder of scenes, in memory."""

    folder: DenseDataset
    pictures: list[Image.Image]
    masks: UInt8[np.ndarray, "n s s"]

    @classmethod
    def read(cls, root: str, count: int) -> "Scenes":
        folder = load_dense(root)
        pictures = [folder.pictures.load(row) for row in range(count)]
        masks = [picture.mask for picture in pictures if picture.mask is not None]
        return cls(folder, [picture.image for picture in pictures], np.stack(masks))


class JoinedTower:
    """The patch features of scenes, read once for all models."""

    def __init__(self) -> None:
        self.tower = select_features(load_vision_tower(TOWER), JOINED)

    @torch.no_grad()
    def features(
        self, scenes: Scenes, patch_size: int, value_path: bool
    ) -> list[Float[torch.Tensor, "n r c d"]]:
        """Of each part of `JOINED`."""
        pixels = torch.stack([self.tower.transform(picture) for picture in scenes.pictures])
        parts = [patch_features(self.tower, p, patch_size, value_path) for p in pixels.split(16)]
        return list(torch.cat(parts).chunk(len(JOINED.split("+")), dim=-1))


@dataclass
class Judged:
    """How well a model's masks agree with the true ones, background by several thresholds."""

    thresholds: Sequence[float]
    """Least cosines."""
    counters: list[IoUCounter]
    """One of each threshold."""
    inside: IoUCounter
    """Of the pixels of things alone: every pixel is of some class."""


@torch.no_grad()
def class_maps(
    segmenter: ZeroShotSegmenter, features: Float[torch.Tensor, "n r c d"]
) -> Iterator[Float[np.ndarray, "r c k"]]:
    """As `segmenter.similarities` has them."""
    for one in features:
        embeds = segmenter.model.embed_features(one.flatten(0, 1)).unflatten(0, one.shape[:2])
        yield (embeds @ segmenter.class_embeds.T).numpy()


def judge(
    maps: Sequence[Float[np.ndarray, "r c k"]],
    segmenter: ZeroShotSegmenter,
    masks: UInt8[np.ndarray, "n s s"],
    thresholds: Sequence[float] | None = None,
) -> Judged:
    """thresholds: None takes quantiles of the best similarities of patches."""
    if thresholds is None:
        most = np.concatenate([m.max(-1).ravel() for m in maps])
        thresholds = np.quantile(most, np.arange(1, NUM_QUANTILES + 1) / (NUM_QUANTILES + 1))
    num_classes = len(segmenter.class_names)
    found = Judged(
        [float(t) for t in thresholds],
        [IoUCounter(num_classes) for _ in thresholds],
        IoUCounter(num_classes),
    )
    for values, true in zip(maps, masks, strict=True):
        best, most = segmenter.best(values, (true.shape[0], true.shape[1]))
        found.inside.add(np.where(true == 0, IGNORED, true), best)
        for threshold, counter in zip(found.thresholds, found.counters, strict=True):
            counter.add(true, np.where(most < threshold, 0, best))
    return found


def of_things(counter: IoUCounter) -> float:
    """Mean IoU over the classes that the true masks hold, background left out."""
    there = [label for label in range(1, counter.num_classes + 1) if counter.counts[label].any()]
    return counter.result(there).mean
