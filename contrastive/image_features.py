"""Image features: computed from pixels, or read from the feature cache (valid because the tower is
locked)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from contrastive import distributed
from contrastive.fetching import one_ahead, start_fetch
from contrastive.model.shaped import read_pixels, shaped_features
from contrastive.vision.grids import GridCuts
from contrastive.vision.tower import VisionTower
from data.batch import Batch, EvalBatch, ShapedImages
from data.cache.features import FeatureCache, Work
from data.config import DataConfig, shared_memory
from data.errors import UsageError
from data.pipeline.prefetch import prefetched
from data.pipeline.reader import ShardReader
from data.progress import Progress
from data.shards.index import load_summaries
from data.shards.names import expand_shards
from data.transform import Cuts

# Bounds the tower's activations; a rank's share may be thousands. On a CPU they should fit into its
# caches: 32 images at a time are a sixth to a third faster than 128. On a GPU few tokens an image
# need many images, or it waits for kernels to be launched.
CPU_IMAGES = 32
FULL_TOKENS = 65_536  # of a batch that fills a GPU: 250 images at patch 16 and 240 px
FULL_IMAGES = (32, 1024)  # but never fewer or more
MIN_SHARED = 2**30  # bytes: 512 images of 240 px are 88 MB, two a worker; containers have 64 MiB


def full_batch(tokens: int, device: torch.device) -> int:
    """Images of so many tokens each that fill a device."""
    if device.type != "cuda":
        return CPU_IMAGES
    least, most = FULL_IMAGES
    return min(most, max(least, FULL_TOKENS // tokens))


def images_read_together(device: torch.device) -> int:
    """How many images a loader's worker hands over at once, to be embedded on `device`."""
    shared = shared_memory()
    little = shared is not None and shared < MIN_SHARED
    return 64 if device.type == "cpu" or little else 512


_Ready = tuple[Batch, Float[Tensor, "b d"], Bool[Tensor, " b"]]
"""A batch without pixels, its features, and which of its slots are good."""


def compute_features(
    tower: VisionTower, batch: EvalBatch, patch_sizes: Sequence[int]
) -> dict[int, Float[Tensor, "b d"]]:
    """Raw tower features at several patch sizes, float32 on the CPU.

    batch: of a reader with `patch_cuts`.
    """
    return start_features(tower, batch, patch_sizes)()


@torch.no_grad()
def start_features(
    tower: VisionTower, batch: EvalBatch, patch_sizes: Sequence[int]
) -> Callable[[], dict[int, Float[Tensor, "b d"]]]:
    """Start `compute_features`; call the result to wait for what it gives."""
    device = next(tower.parameters()).device
    if batch.images is None:
        by_size = zip(patch_sizes, batch.shaped, strict=True)
        found = [_whole_features(tower, images, size) for size, images in by_size]
    else:
        images = tower.transform.normalise(distributed.send(batch.images, device))  # once, for all
        found = []
        for size in patch_sizes:
            parts = images.split(full_batch(tower.num_tokens(size), device))
            found.append(torch.cat([tower(part, size) for part in parts]))
    fetched = start_fetch(found)
    return lambda: dict(zip(patch_sizes, fetched(), strict=True))


def _whole_features(
    tower: VisionTower, images: ShapedImages, patch_size: int
) -> Float[Tensor, "b d"]:
    """The tower's features of images of many shapes, on its device."""
    pixels = read_pixels(tower, images)
    most = full_batch(tower.num_tokens(patch_size), next(tower.parameters()).device)
    parts = (pixels[first : first + most] for first in range(0, len(pixels), most))
    return torch.cat([shaped_features(tower, part) for part in parts])


def patch_cuts(tower: VisionTower, patch_sizes: Sequence[int]) -> Cuts | None:
    """What a reader resizes images to, as `LitModel.encode_image` does at these patch sizes; None:
    the square that all share."""
    side, fit = tower.image_size, tower.transform.fit
    asked = tuple(((side // size) ** 2, size) for size in patch_sizes)
    return GridCuts(side, fit, asked) if fit == "aspect" else None


def in_parts(
    tower: VisionTower, images: UInt8[Tensor, "b 3 s s"], patch_size: int
) -> Float[Tensor, "b d"]:
    """The tower's features of any number of images, on its device, normalised there."""
    device = next(tower.parameters()).device
    features = []
    for part in images.split(full_batch(tower.num_tokens(patch_size), device)):
        pixels = tower.transform.normalise(distributed.send(part, device))
        features.append(tower(pixels, patch_size))
    return torch.cat(features)


class FeatureSource:
    """Gives training batches their image features: from the cache, or computed."""

    def __init__(self, tower: VisionTower, cfg: DataConfig, patch_sizes: Sequence[int]) -> None:
        self._tower = tower
        self._cache: FeatureCache | None = None
        self.bad_images = 0  # that the cache lacks; without a cache, each step meets its own
        if cfg.features:
            self._cache = fill_cache(tower, cfg, patch_sizes)
            self.bad_images = self._cache.num_missing_samples()
            if self.bad_images and cfg.on_error == "raise":
                raise UsageError(
                    f"{self.bad_images} images of these shards could not be read when "
                    f"data.features {cfg.features} was filled; allowed with data.on_error skip"
                )

    @torch.no_grad()
    def __call__(
        self, batch: Batch, patch_size: int
    ) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
        """Raw features of the batch's slots, and which slots are good."""
        if self._cache is None:
            assert batch.images is not None
            return in_parts(self._tower, batch.images, patch_size), batch.valid
        features, found = self._cache.lookup(
            batch.shards.numpy(), batch.indices.numpy(), patch_size, batch.views.numpy()
        )
        return torch.from_numpy(features), batch.valid & torch.from_numpy(found)

    def ahead(
        self, steps: Iterable[Iterable[Batch]], patch_size_of: Callable[[int], int]
    ) -> Iterator[_Ready]:
        """Each step's batch with its features at the step's patch size, without pixels.

        steps: the parts of each (`CaptionedPipeline.steps`); the pixels of one part are in memory
        at a time. The next batch is requested before the current one is yielded: from a thread
        where features are cached. On a GPU the tower, or the copy of cached features, has a stream
        of its own, so it works while the text tower trains.
        """
        device = distributed.device()
        side = torch.cuda.Stream() if device.type == "cuda" else None
        made: Iterator[_Ready] = (self._whole(parts, patch_size_of) for parts in steps)
        if self._cache is not None:
            made = prefetched(made if side is None else (_pinned(item, device) for item in made))
        waiting: _Ready | None = None
        computed: torch.cuda.Event | None = None
        more = True
        while more:
            before, done = waiting, computed
            with torch.cuda.stream(side):  # nothing, without a GPU
                waiting = next(made, None)
                if waiting is not None and side is not None:
                    batch, features, valid = waiting
                    features = features.to(device, non_blocking=True)
                    waiting, computed = (batch, features, valid), side.record_event()
            if before is not None:
                yield _arrived(before, done)
            more = waiting is not None

    def _whole(self, parts: Iterable[Batch], patch_size_of: Callable[[int], int]) -> _Ready:
        """One batch of a step's parts, each without its pixels once its features are known."""
        without_pixels, features, valid = [], [], []
        for part in parts:
            known, good = self(part, patch_size_of(part.step))
            part.images = None
            without_pixels.append(part)
            features.append(known)
            valid.append(good)
        if len(without_pixels) == 1:
            return without_pixels[0], features[0], valid[0]
        return Batch.join(without_pixels), torch.cat(features), torch.cat(valid)


def _pinned(item: _Ready, device: torch.device) -> _Ready:
    """In page-locked memory, from which copies do not wait."""
    torch.cuda.set_device(device)  # each thread has one of its own
    batch, features, valid = item
    return batch.pin_memory(), features.pin_memory(), valid.pin_memory()


def _arrived(item: _Ready, ready: "torch.cuda.Event | None") -> _Ready:
    """Features of another stream, safe to use on the current one."""
    if ready is not None:
        here = torch.cuda.current_stream()
        here.wait_event(ready)
        if item[1].is_cuda:
            item[1].record_stream(here)
    return item


# ---- fill the cache ------------------------------------------------------------------------


def fill_cache(tower: VisionTower, cfg: DataConfig, patch_sizes: Sequence[int]) -> FeatureCache:
    """Open the cache in `cfg.features`, first computing what it lacks.

    Ranks share the shards; a shard's features appear whole or not at all, so an interrupted fill
    goes on where it stopped. Raises `UsageError` when the folder belongs to another tower,
    transform, augmentation or set of shards.
    """
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    cache = FeatureCache(
        cfg.features,
        tower.fingerprint,
        shards,
        patch_sizes,
        views=cfg.views,
        augment_fingerprint=cfg.augment.fingerprint(),
        made_of=tower.made_of,
        max_pixels=cfg.max_pixels,
        index_dir=cfg.index_dir,
    )
    own = Progress(
        distributed.own_share(range(len(shards))),
        "checking cached features",
        unit="shard",
        delay=2,
        disable=not distributed.is_main(),
    )
    missing = sorted(
        distributed.gather_lists([work for shard in own for work in cache.missing([shard])])
    )
    if missing:
        if distributed.is_main():
            cache.claim(tower.embed_dim)
        distributed.barrier()
        cache.width = tower.embed_dim
        mine = distributed.own_share(missing)
        sizes = sorted({size for _, work in missing for s in work.values() for size in s})
        summaries = load_summaries([shards[shard] for shard, _ in mine], cfg.index_dir)
        with Progress(
            total=sum(
                s.num_samples * len(work) for s, (_, work) in zip(summaries, mine, strict=True)
            ),
            unit="img",
            desc=f"image features at patch {', '.join(map(str, sizes))}",
            disable=not distributed.is_main(),
        ) as bar:
            for work, group in groupby(mine, key=lambda item: item[1]):
                _compute_shards(tower, cfg, cache, shards, [n for n, _ in group], work, bar)
        distributed.barrier(patient=True)
    return cache


def _compute_shards(
    tower: VisionTower,
    cfg: DataConfig,
    cache: FeatureCache,
    shards: list[str],
    numbers: list[int],
    work: Work,
    bar: Progress,
) -> None:
    """Compute the same work for some shards, each written as soon as its last sample is done."""
    for view, sizes in work.items():
        reader = _reader(tower, cfg, [shards[n] for n in numbers], view, sizes)
        done: list[tuple[list[str], dict[int, Tensor]]] = []
        started = (
            (step, start_features(tower, step[1], sizes) if step[1] is not None else dict)
            for step in reader.steps()
        )
        for (position, batch, last), features in one_ahead(started):
            if batch is not None:
                done.append((batch.keys, features))
                bar.update(len(batch.keys))
            if last:
                _write(cache, tower, numbers[position], view, sizes, done)
                done = []
        if reader.errors:
            kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in reader.errors.items())
            Progress.write(f"skipped while reading images: {kinds}")


def _write(
    cache: FeatureCache,
    tower: VisionTower,
    shard: int,
    view: int,
    sizes: Sequence[int],
    done: list[tuple[list[str], dict[int, Tensor]]],
) -> None:
    none = np.zeros((0, tower.embed_dim), dtype=np.float32)
    keys = [key for keys, _ in done for key in keys]
    for size in sizes:
        features = np.concatenate([none, *(features[size].numpy() for _, features in done)])
        cache.write(shard, size, view, keys, features)


def _reader(
    tower: VisionTower, cfg: DataConfig, shards: list[str], view: int, sizes: Sequence[int]
) -> ShardReader:
    return ShardReader(
        shards,
        tower.transform,
        batch_size=images_read_together(next(tower.parameters()).device),
        num_workers=cfg.num_workers,
        augment=partial(cfg.augment, view=view) if view else None,
        on_error=cfg.on_error,
        max_pixels=cfg.max_pixels,
        allow_pipe=cfg.allow_pipe,
        index_dir=cfg.index_dir,
        cuts=patch_cuts(tower, sizes),
    )
