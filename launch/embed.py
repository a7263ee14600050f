"""Embed the images of shards at several patch sizes, in one pass over the pixels.

    deepspeed launch/embed.py --model runs/demo/model --shards 'p/{0000..0009}.tar' \
        --patch-sizes 56 28 --out embeddings        # or python launch/embed.py ...
"""

from dataclasses import dataclass

import tyro

from contrastive.distributed import device, init_from_launcher, is_main, shutdown
from contrastive.model.lit import LitModel
from data.config import OnError
from data.errors import exit_on_usage_error
from data.shards.index import expand_shards
from retrieval.embed.bulk import check_batches, embed_shards


@dataclass(frozen=True)
class Args:
    model: str
    """Folder of the model."""
    shards: tuple[str, ...]
    """WebDataset tars: names, globs, brace ranges; anything fsspec opens."""
    out: str
    """Folder to write; an interrupted run continues."""
    patch_sizes: tuple[int, ...] = ()
    """Pixels; all of the model's when not given."""
    batch_size: int = 64
    """Images per forward, one rank."""
    num_workers: int = 2
    """Loader processes per rank."""
    on_error: OnError = "skip"
    """Skip and count images that cannot be read, or stop at the first."""
    allow_pipe: bool = False
    """Allow webdataset's pipe: names, which run commands."""


def main() -> None:
    init_from_launcher()
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error():
        check_batches(args.batch_size, args.num_workers)
        shards = expand_shards(args.shards, allow_pipe=args.allow_pipe)
        manifest = embed_shards(
            LitModel.from_pretrained(args.model, device=device()),
            shards,
            args.patch_sizes,
            args.out,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_error=args.on_error,
            allow_pipe=args.allow_pipe,
            model_dir=args.model,
        )
    if is_main():
        skipped = ", ".join(f"{kind} {n:,}" for kind, n in manifest["errors"].items()) or "none"
        print(
            f"{args.out}: {manifest['count']:,} images at patch "
            f"{', '.join(map(str, manifest['patch_sizes']))}; skipped: {skipped}"
        )
    shutdown()


if __name__ == "__main__":
    main()
