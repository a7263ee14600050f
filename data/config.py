"""What to train on. Imports no torch: programs parse their command line before that."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data.errors import UsageError

if TYPE_CHECKING:
    from data.images import Augment


OnError = Literal["skip", "raise"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    shards: tuple[str, ...] = ()
    """Tars with KEY.jpg|png|webp and KEY.txt or KEY.json: paths or fsspec URLs; braces, globs."""
    weights: tuple[float, ...] = ()
    """One per entry of `shards`: its share of the samples. Empty: all shards are one source."""
    features: str = ""
    """Folder of cached image features and tokens, written where missing. Empty: pixels are read in
    each step."""
    views: int = 1
    """Views of each image: the plain one, and views - 1 augmented ones that stay the same; one is
    drawn per epoch."""
    crop: float = 1.0
    """Augmented views: smallest share of the largest square that a random square keeps."""
    flip: bool = False
    """Augmented views: mirror half of them."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    on_error: OnError = "skip"
    """Bad samples: skip and count them, or raise with shard, key and cause."""
    allow_pipe: bool = False
    """Let `pipe:COMMAND` shards run their command."""
    block_shards: int = 16
    """Shards shuffled together, each loader worker keeps the indices of twice as many."""
    max_pixels: int = 100_000_000
    """Images of more pixels are not decoded."""
    index_dir: str = ""
    """Folder for shard indices. Empty: beside each shard, or in the user's cache."""

    @property
    def augment(self) -> "Augment":
        """How augmented views are made."""
        from data.images import Augment

        return Augment(self.crop, self.flip)


def check_views(cfg: DataConfig) -> None:
    """Raises `UsageError` for values that cannot work."""
    if cfg.views < 1:
        raise UsageError(f"--data.views {cfg.views}: at least 1, the plain view")
    if not 0 < cfg.crop <= 1:
        raise UsageError(f"--data.crop {cfg.crop}: above 0, at most 1")
    augments = cfg.flip or cfg.crop < 1
    if augments != (cfg.views > 1):
        raise UsageError(
            f"--data.views {cfg.views} with --data.crop {cfg.crop} and --data.flip {cfg.flip}: "
            "augmented views need more than one view, and a crop below 1 or the flip"
        )


def check_loading(num_workers: int, max_pixels: int) -> None:
    """Raises `UsageError` for values that cannot work."""
    if num_workers < 0:
        raise UsageError(f"num_workers is {num_workers}, allowed are 0 and more")
    if max_pixels < 1:
        raise UsageError(f"max_pixels is {max_pixels}, allowed are 1 and more")
