"""Embed the images of shards at several patch sizes, in one pass over the files.

    deepspeed launch/embed.py --model runs/demo/model --shards 'p/{0000..0009}.tar' \\
        --patch-sizes 56 28 --out embeddings        # or python launch/embed.py ...
    python launch/embed.py ... --max-tokens 64 --fit aspect --out embeddings
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from contrastive.launch_context import take_arguments
from data.config import NUM_WORKERS, Fit, OnError
from data.errors import exit_on_usage_error, short_list
from data.files import make_folder
from retrieval.detail import of_manifest, said
from retrieval.embed.config import BATCH_SIZE, check_batches, check_sizes
from retrieval.embed.manifest import lost_shards
from retrieval.model_folder import check_model_folder


@dataclass(frozen=True)
class Args:
    model: str
    """open_clip:ARCHITECTURE@TAG or @FILE, transformers:FOLDER, or a model's folder."""
    shards: tuple[str, ...]
    """WebDataset tars: names, globs, brace ranges; anything fsspec opens."""
    out: str
    """Folder to write; an interrupted run continues."""
    patch_sizes: tuple[int, ...] = ()
    """In pixels. Empty: all of the model's."""
    max_tokens: tuple[int, ...] = ()
    """Instead of patch sizes: at most so many patches an image, any number. The grid and the size
    of its patches are chosen for each image."""
    fit: Fit | None = None
    """crop cuts a square from the middle of an image, squash makes one of the whole, aspect keeps
    its shape. Not given: the model's own."""
    batch_size: int = BATCH_SIZE
    """Images read together, one rank; 0: 64, on a GPU 512."""
    num_workers: int = NUM_WORKERS
    """Loader processes per rank."""
    on_error: OnError = "skip"
    """Skip and count unreadable images, or stop at the first."""
    allow_pipe: bool = False
    """Allow webdataset's pipe: names, which run commands."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__, args=take_arguments())
    with exit_on_usage_error(Args):
        check_batches(args.batch_size, args.num_workers)
        check_sizes(args.patch_sizes, args.max_tokens)
        from data.shards.names import expand_shards

        shards = expand_shards(args.shards, allow_pipe=args.allow_pipe)
        check_model_folder(args.model)
        make_folder(Path(args.out).absolute().parent)

        from contrastive import LitModel, distributed
        from retrieval import embed_shards

        with distributed.launched():
            manifest = embed_shards(
                LitModel.from_pretrained(args.model, device=distributed.device()),
                shards,
                args.patch_sizes,
                args.out,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                on_error=args.on_error,
                allow_pipe=args.allow_pipe,
                model_dir=args.model,
                max_tokens=args.max_tokens,
                fit=args.fit,
            )
            if distributed.is_main():
                errors = manifest["errors"]
                skipped = ", ".join(f"{kind} {n:,}" for kind, n in errors.items()) or "none"
                lost = lost_shards(manifest)
                damaged = f"; damaged or empty shards: {short_list(lost)}" if lost else ""
                print(
                    f"{args.out}: {manifest['count']:,} images at {said(*of_manifest(manifest))}; "
                    f"skipped: {skipped}{damaged}"
                )


if __name__ == "__main__":
    main()
