"""What to train on. Imports no torch: programs parse their command line before that."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data.errors import UsageError

if TYPE_CHECKING:
    from data.images import Augment

OnError = Literal["skip", "raise"]
Fit = Literal["crop", "squash", "aspect"]  # see `data.transform.ImageTransform.fit`
MAX_PIXELS = 100_000_000  # of an image that is decoded
WORKER_BYTES = 2**28  # of shared memory a process: two parts of 512 images of 240 px are 180 MB
FEWEST_WORKERS, MOST_WORKERS = 2, 16


def shared_memory() -> int | None:
    """Bytes in which processes hand over pixels; None where a system has another way."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


def suited_workers(cores: int, ranks: int, shared: int | None) -> int:
    """Processes for each of the ranks of a machine: its share of the cores, less two for the rank
    itself, as far as shared memory goes. They wait when a rank is slower than they are."""
    most = MOST_WORKERS if shared is None else min(MOST_WORKERS, shared // ranks // WORKER_BYTES)
    return max(FEWEST_WORKERS, min(most, cores // ranks - 2))


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


NUM_WORKERS = suited_workers(_cores(), int(os.environ.get("LOCAL_SIZE", "1")), shared_memory())
"""Loader processes of one rank of this machine: 14 on 16 cores, 2 on two."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    shards: tuple[str, ...] = ()
    """Tars with KEY.jpg|png|webp and KEY.txt or KEY.json: paths or fsspec URLs; braces, globs."""
    weights: tuple[float, ...] = ()
    """One per entry of `shards`: its share of the samples. Empty: all shards are one source."""
    features: str = ""
    """Folder of cached image features and tokens, filled on first use.
    Empty: pixels are read in each step."""
    captions_per_image: int = 1
    """Captions of an image that a step reads, all of them its positives; fewer where it has
    fewer. Each epoch draws others."""
    views: int = 1
    """Views of each image: itself and views - 1 fixed augmented ones; each epoch draws one."""
    crop: float = 1.0
    """Augmented views: least area of a random square crop, as a share of the largest square."""
    flip: bool = False
    """Augmented views: mirror half of them."""
    num_workers: int = NUM_WORKERS
    """Loader processes per rank, which read shards; 0 loads in the training process. Batches from
    `features` are made by a thread, whatever this is."""
    on_error: OnError = "skip"
    """Bad samples: skip and count them, or raise with shard, key and cause."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` shards run their command."""
    block_shards: int = 16
    """Shards shuffled together; each loader worker keeps the indices of twice as many."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are not decoded."""
    index_dir: str = ""
    """Folder for shard indices. Empty: beside each shard, or in the user's cache."""

    @property
    def augment(self) -> "Augment":
        """How augmented views are made."""
        from data.images import Augment

        return Augment(self.crop, self.flip)


def check_data(cfg: DataConfig) -> None:
    """Raise `UsageError` for values that cannot work."""
    check_loading(cfg.num_workers, cfg.max_pixels, "data.")
    if cfg.block_shards < 1:
        raise UsageError(f"data.block_shards {cfg.block_shards}: at least 1")
    check_weights("data.weights", cfg.weights, "data.shards", len(cfg.shards), zeros=False)
    if cfg.captions_per_image < 1:
        raise UsageError(f"data.captions_per_image {cfg.captions_per_image}: at least 1")
    if cfg.views < 1:
        raise UsageError(f"data.views {cfg.views}: at least 1, the plain view")
    if not 0 < cfg.crop <= 1:
        raise UsageError(f"data.crop {cfg.crop}: above 0, at most 1")
    augments = cfg.flip or cfg.crop < 1
    if augments != (cfg.views > 1):
        raise UsageError(
            f"data.views {cfg.views} with data.crop {cfg.crop} and data.flip {cfg.flip}: "
            "augmented views need more than one view, and a crop below 1 or the flip"
        )


def check_loading(num_workers: int, max_pixels: int, prefix: str = "") -> None:
    """Raise `UsageError` for values that cannot work; prefix: of their names in the message."""
    if num_workers < 0:
        raise UsageError(f"{prefix}num_workers {num_workers}: at least 0")
    if max_pixels < 1:
        raise UsageError(f"{prefix}max_pixels {max_pixels}: at least 1")


def check_weights(
    name: str, weights: Sequence[float], what: str, count: int, *, zeros: bool = True
) -> None:
    """Raise `UsageError` unless there are no weights, or one for each of `count` things.

    name, what: the parameters' names, for the message. zeros: some of the weights may be 0.
    """
    if weights and len(weights) != count:
        raise UsageError(f"{name} has {len(weights)} values for {count} {what}; give one for each")
    if not all(0 < w < math.inf or (zeros and w == 0) for w in weights):
        allowed = "positive numbers, or 0" if zeros else "positive numbers"
        raise UsageError(f"{name} {tuple(weights)}: allowed are {allowed}")
    if weights and not any(weights):
        raise UsageError(f"{name} are all 0; give one of the {what} a weight above 0")
