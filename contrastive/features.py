"""Image features: computed from pixels in one pass, or read from the cache that the lock allows."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from contrastive import distributed
from contrastive.vision import VisionTower
from data.batch import Batch, EvalBatch
from data.errors import UsageError
from data.features import FeatureCache, write_manifest, write_shard_features
from data.pipeline import DataConfig
from data.reader import ShardReader
from data.shards import expand_shards, load_summaries, shard_name

IMAGES_PER_FORWARD = 256  # bounds the tower's activations; a rank's share may be thousands


@torch.no_grad()
def compute_features(
    tower: VisionTower, reader: ShardReader, patch_sizes: Sequence[int]
) -> Iterator[tuple[EvalBatch, dict[int, Float[Tensor, "b d"]]]]:
    """Raw tower features at several patch sizes in one pass over the pixels, float32 on the CPU."""
    device = next(tower.parameters()).device
    for batch in reader:
        assert batch.images is not None
        images = batch.images.to(device, non_blocking=True)
        yield batch, {size: tower(images, size).cpu() for size in patch_sizes}


class FeatureSource:
    """Gives a training batch its image features: from the cache if there is one, else computed."""

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
                    f"--data.features {cfg.features} was filled; allowed with --data.on-error skip"
                )

    @torch.no_grad()
    def __call__(
        self, batch: Batch, patch_size: int
    ) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
        """Raw features of the batch's slots, and which slots are good."""
        if self._cache is None:
            assert batch.images is not None
            device = next(self._tower.parameters()).device
            parts = batch.images.split(IMAGES_PER_FORWARD)
            done = [self._tower(p.to(device, non_blocking=True), patch_size) for p in parts]
            return torch.cat(done), batch.valid
        features, found = self._cache.lookup(
            batch.shards.numpy(), batch.indices.numpy(), patch_size
        )
        return torch.from_numpy(features), batch.valid & torch.from_numpy(found)


def fill_cache(tower: VisionTower, cfg: DataConfig, patch_sizes: Sequence[int]) -> FeatureCache:
    """Open the cache in `cfg.features`, first computing what it lacks.

    Ranks share the shards; a shard's features appear whole or not at all, so an interrupted fill
    goes on where it stopped. Raises `UsageError` when the folder belongs to another tower,
    transform or set of shards.
    """
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    fingerprint = tower.fingerprint
    folder = Path(cfg.features)
    missing = FeatureCache.open(folder, fingerprint, shards, patch_sizes, cfg.index_dir).missing()
    distributed.barrier()  # all ranks see the same work before one of them does any
    if missing:
        if distributed.is_main():
            write_manifest(folder, fingerprint, tower.embed_dim, shards, index_dir=cfg.index_dir)
        distributed.barrier()
        mine = missing[distributed.rank() :: distributed.world_size()]
        with tqdm(
            total=sum(s.num_samples for s in load_summaries([m[0] for m in mine], cfg.index_dir)),
            unit="img",
            desc=f"image features at patch {', '.join(map(str, patch_sizes))}",
            disable=not distributed.is_main(),
        ) as bar:
            for sizes, group in groupby(mine, key=lambda work: work[1]):
                _cache_shards(tower, cfg, [shard for shard, _ in group], sizes, bar)
        distributed.barrier()
    return FeatureCache.open(folder, fingerprint, shards, patch_sizes, cfg.index_dir)


def _cache_shards(
    tower: VisionTower, cfg: DataConfig, shards: list[str], patch_sizes: Sequence[int], bar: tqdm
) -> None:
    """Write the features of these shards, each as soon as its last sample is done."""
    reader = _reader(tower, cfg, shards)
    batches = compute_features(tower, reader, patch_sizes)
    next_shard = 0
    for number, group in groupby(batches, key=lambda item: item[0].shard):
        for without_samples in shards[next_shard:number]:
            _write(tower, cfg, without_samples, [], {size: [] for size in patch_sizes})
        keys: list[str] = []
        rows: dict[int, list[np.ndarray]] = {size: [] for size in patch_sizes}
        for batch, features in group:
            keys += batch.keys
            for size in patch_sizes:
                rows[size].append(features[size].numpy())
            bar.update(len(batch.keys))
        _write(tower, cfg, shards[number], keys, rows)
        next_shard = number + 1
    for without_samples in shards[next_shard:]:
        _write(tower, cfg, without_samples, [], {size: [] for size in patch_sizes})
    if reader.errors:
        kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in reader.errors.items())
        tqdm.write(f"skipped while reading images: {kinds}")


def _write(
    tower: VisionTower,
    cfg: DataConfig,
    shard: str,
    keys: list[str],
    rows: dict[int, list[np.ndarray]],
) -> None:
    none = np.zeros((0, tower.embed_dim), dtype=np.float32)
    for size, parts in rows.items():
        features = np.concatenate([none, *parts])
        write_shard_features(cfg.features, shard_name(shard), size, keys, features)


def _reader(tower: VisionTower, cfg: DataConfig, shards: list[str]) -> ShardReader:
    return ShardReader(
        shards,
        tower.transform,
        batch_size=64,
        num_workers=cfg.num_workers,
        on_error=cfg.on_error,
        max_pixels=cfg.max_pixels,
        allow_pipe=cfg.allow_pipe,
        index_dir=cfg.index_dir,
    )
