"""Build a searchable index from embeddings or from a folder of pictures, or change one.

    python launch/index.py --embeddings embeddings --out index [--kind auto] [--latency-ms 10]
    python launch/index.py --images photos --model runs/demo/model --out index     # and again
    python launch/index.py --out index --embeddings more --add
    python launch/index.py --out index --delete 17 4294967301 --compact

Run again, --images takes in what is new, changed or gone. All changes work while the index is read.
"""

from dataclasses import dataclass

import tyro

from data.config import OnError
from data.errors import UsageError, exit_on_usage_error
from retrieval.index.build import add_embeddings, build_index, compact_index, delete_ids
from retrieval.index.create import IndexKind
from retrieval.index.gpus import Device
from retrieval.index.manifest import LATENCY_MS
from retrieval.index.photos import index_photos


@dataclass(frozen=True)
class Args:
    out: str
    """Folder of the index."""
    embeddings: str = ""
    """Folder written by launch/embed.py."""
    images: str = ""
    """Folder of pictures; KEY.txt beside a picture is its caption."""
    model: str = ""
    """Folder of the model; the one that the embeddings name when not given."""
    kind: IndexKind = "auto"
    """flat and flat16 are exact, ivf, ivfpq and hnsw approximate; auto picks and says why."""
    latency_ms: float = LATENCY_MS
    """What one query may take."""
    memory_gib: float = 0.0
    """What the index may take; half of the memory of CPU or GPUs when not given."""
    device: Device = "auto"
    """Where FAISS trains, and for what the kind is picked."""
    patch_sizes: tuple[int, ...] = ()
    """With --images: pixels; all of the model's when not given."""
    add: bool = False
    """Add the embeddings to an index that is there."""
    delete: tuple[int, ...] = ()
    """Ids to take out."""
    compact: bool = False
    """Merge what was added and deleted."""
    batch_size: int = 64
    """With --images: images per forward."""
    num_workers: int = 2
    """With --images: loader processes."""
    on_error: OnError = "skip"
    """With --images: skip and count pictures that cannot be read, or stop at the first."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with exit_on_usage_error():
        if args.embeddings and args.images:
            raise UsageError("give --embeddings or --images, not both")
        if args.add and not args.embeddings:
            raise UsageError("--add needs --embeddings")
        if args.images:
            _index_photos(args)
        elif args.add:
            print(f"{args.out}: added {add_embeddings(args.out, args.embeddings):,} images")
        elif args.embeddings:
            reason = build_index(
                args.embeddings, args.out, args.model, args.kind, args.device, args.latency_ms,
                args.memory_gib,
            )  # fmt: skip
            print(f"{args.out}: {reason}")
        elif not args.delete and not args.compact:
            raise UsageError("nothing to do: give --embeddings, --images, --delete or --compact")
        if args.delete:
            print(f"{args.out}: deleted {delete_ids(args.out, args.delete):,} images")
        if args.compact:
            print(f"{args.out}: {compact_index(args.out, args.device)}")


def _index_photos(args: Args) -> None:
    if not args.model:
        raise UsageError("--images needs --model, the folder of the model that looks at them")
    report = index_photos(
        args.images, args.model, args.out, args.patch_sizes, args.kind, args.device,
        args.latency_ms, args.memory_gib, args.batch_size, args.num_workers, args.on_error,
    )  # fmt: skip
    skipped = ", ".join(f"{kind} {n:,}" for kind, n in report.errors.items()) or "none"
    print(
        f"{args.out}: {report.added:,} new, {report.changed:,} changed, {report.gone:,} gone, "
        f"{report.unchanged:,} as before; skipped: {skipped}"
    )
    print(f"{args.out}: {report.reason}")


if __name__ == "__main__":
    main()
