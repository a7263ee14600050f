"""Batches of images that are not in shards."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import EvalBatch, Pixels, batch_pixels
from data.config import NUM_WORKERS, OnError, check_loading
from data.pipeline.workers import begin_worker
from data.problems import Problem, attempt, skip_or_raise
from data.transform import Cuts, ImageTransform
from retrieval.evaluation.datasets.image_source import ImageSource


class ImageReader:
    """Images in batches, in order. Iterate for `EvalBatch`; unreadable ones are counted.

    share: (rank, ranks); ranks take whole batches in turn. Batches without any readable image are
    left out. The batches' `indices` are rows of `images`.
    """

    def __init__(
        self,
        images: ImageSource,
        transform: ImageTransform,
        batch_size: int = 64,
        num_workers: int = NUM_WORKERS,
        on_error: OnError = "skip",
        share: tuple[int, int] = (0, 1),
        max_pixels: int = 100_000_000,
        cuts: Cuts | None = None,
    ) -> None:
        check_loading(num_workers, max_pixels)
        self.errors: dict[str, int] = {}
        self._on_error: OnError = on_error
        starts = range(share[0] * batch_size, len(images), share[1] * batch_size)
        self._loader = DataLoader(
            _Images(images, transform, max_pixels, cuts),
            batch_sampler=[list(range(s, min(s + batch_size, len(images)))) for s in starts],
            num_workers=num_workers,
            worker_init_fn=begin_worker,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),  # leaves torch's own untouched
        )

    def __iter__(self) -> Iterator[EvalBatch]:
        self.errors.clear()
        for samples in self._loader:
            for bad in samples:
                if isinstance(bad, Problem):
                    skip_or_raise(bad, "", self._on_error, self.errors)
            good = [sample for sample in samples if not isinstance(sample, Problem)]
            if good:
                rows, keys, labels, captions, pixels = zip(*good, strict=True)
                zeros = torch.zeros(len(good), dtype=torch.int64)
                squares, shaped = batch_pixels(pixels)
                yield EvalBatch(
                    keys=list(keys),
                    images=squares,
                    captions=list(captions),
                    labels=torch.tensor(labels),
                    shard=0,
                    indices=torch.tensor(rows),
                    offsets=zeros,
                    sizes=zeros,
                    shaped=shaped,
                )


Loaded = tuple[int, str, int, tuple[str, ...], Pixels]


class _Images(Dataset):
    def __init__(
        self, images: ImageSource, transform: ImageTransform, max_pixels: int, cuts: Cuts | None
    ) -> None:
        self.images, self.transform, self.max_pixels = images, transform, max_pixels
        self.cuts = cuts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Loaded | Problem:
        key = self.images.key(row)
        return attempt(key, lambda: self._load(row, key))

    def _load(self, row: int, key: str) -> Loaded:
        image, label = self.images.load(row, self.max_pixels)
        return row, key, label, self.images.captions(row), self.transform.pixels(image, self.cuts)
