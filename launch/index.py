"""Build or change a searchable index of embeddings or of a folder of photos.

    python launch/index.py --embeddings embeddings --out index [--index-type auto] [--latency-ms 10]
    python launch/index.py --images photos --model runs/demo/model --out index     # and again
    python launch/index.py --out index --embeddings more --add
    python launch/index.py --out index --delete 17 4294967301 --compact
    python launch/index.py --embeddings embeddings --out milvus:http://localhost:19530/photos

With --images, running it again picks up new, changed and deleted photos, and a folder that was
moved. An index can be changed while it is being searched.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.config import OnError
from data.errors import UsageError, exit_on_usage_error
from data.files import make_folder
from retrieval.embed.config import BATCH_SIZE, NUM_WORKERS, check_batches
from retrieval.embed.manifest import read_manifest
from retrieval.index.config import LATENCY_MS, Device, IndexTypeChoice
from retrieval.index_places import find_place
from retrieval.milvus.address import is_address, parse_address
from retrieval.model_folder import check_model_folder


@dataclass(frozen=True)
class Args:
    out: Annotated[str, tyro.conf.arg(aliases=["--index"])]
    """Folder of the index; or milvus:URI/NAME, where embeddings are added and ids deleted too."""
    embeddings: str = ""
    """Folder written by launch/embed.py."""
    images: str = ""
    """Folder of photos; KEY.txt beside a photo is its caption."""
    model: str = ""
    """Folder of the model. Not given: the one that the embeddings name."""
    index_type: IndexTypeChoice = "auto"
    """flat and flat16 are exact; ivf, ivfpq and hnsw approximate; auto picks and says why."""
    latency_ms: float = LATENCY_MS
    """Time that one query may take; auto picks by it."""
    memory_gib: float = 0.0
    """Memory that the index may take. 0: half of the CPU's or GPUs' memory."""
    device: Device = "auto"
    """Where FAISS trains, and what auto picks the index type for."""
    patch_sizes: tuple[int, ...] = ()
    """With --images: patch sizes in pixels. Empty: all of the model's."""
    prune: bool = False
    """With --images: drop photos of folders that are empty, missing or cannot be listed."""
    add: bool = False
    """Add the embeddings to an existing index."""
    delete: tuple[int, ...] = ()
    """Ids to delete."""
    compact: bool = False
    """Merge additions and deletions into the index."""
    batch_size: int = BATCH_SIZE
    """With --images: images read together; 0: 64, on a GPU 512."""
    num_workers: int = NUM_WORKERS
    """With --images: loader processes."""
    on_error: OnError = "skip"
    """With --images: skip and count unreadable photos and captions, or stop at the first."""


def parse() -> Args:
    typed = [re.sub(r"^--kind(?=$|=)", "--index-type", a) for a in sys.argv[1:]]
    if typed != sys.argv[1:]:
        print("--kind is called --index-type now", file=sys.stderr)
    return tyro.cli(Args, description=__doc__, args=typed)


def check(args: Args) -> None:
    """What can be refused before FAISS and torch are imported."""
    if args.embeddings and args.images:
        raise UsageError("give --embeddings or --images, not both")
    if args.add and not args.embeddings:
        raise UsageError("--add needs --embeddings")
    if args.prune and not args.images:
        raise UsageError("--prune needs --images")
    if args.images and not args.model:
        raise UsageError("--images needs --model, the folder of the model that looks at them")
    if not (args.embeddings or args.images or args.delete or args.compact):
        raise UsageError("nothing to do: give --embeddings, --images, --delete or --compact")
    if is_address(args.out) and (args.images or args.compact):
        what = "--images" if args.images else "--compact"
        raise UsageError(f"{what} is for a folder; Milvus takes embeddings, and compacts by itself")
    if args.images:
        check_batches(args.batch_size, args.num_workers)
        if not Path(args.images).is_dir():
            raise UsageError(f"{args.images} is no folder of photos")
        check_model_folder(args.model)
    if args.embeddings:
        source = read_manifest(args.embeddings)
        if not args.add:
            check_model_folder(args.model or source["model"])
    if not is_address(args.out) and (args.images or (args.embeddings and not args.add)):
        make_folder(Path(args.out).absolute().parent)
    if args.add or not (args.embeddings or args.images):
        find_place(args.out).manifest()


def main() -> None:
    args = parse()
    with exit_on_usage_error(Args):
        check(args)
        if is_address(args.out):
            _change_milvus(args)
            return

        from retrieval import add_embeddings, build_index, compact_index, delete_ids

        if args.images:
            _index_photos(args)
        elif args.add:
            added = add_embeddings(args.out, args.embeddings)
            print(f"{args.out}: added {added:,} images{_passed_over(args, added)}")
        elif args.embeddings:
            reason = build_index(
                args.embeddings, args.out, args.model, args.index_type, args.device,
                args.latency_ms, args.memory_gib,
            )  # fmt: skip
            count = find_place(args.out).manifest().count
            print(f"{args.out}: {reason}{_passed_over(args, count)}")
        if args.images or args.embeddings:
            _say_how_sizes_agree(args)
        if args.delete:
            print(f"{args.out}: deleted {delete_ids(args.out, args.delete):,} images")
        if args.compact:
            print(f"{args.out}: {compact_index(args.out, args.device)}")


def _change_milvus(args: Args) -> None:
    from retrieval.milvus.write import add_to_milvus, build_in_milvus, delete_in_milvus

    address = parse_address(args.out)
    if args.add:
        added = add_to_milvus(address, args.embeddings)
        print(f"{args.out}: added {added:,} images{_passed_over(args, added)}")
    elif args.embeddings:
        reason = build_in_milvus(args.embeddings, address, args.model, args.index_type)
        count = find_place(args.out).manifest().count
        print(f"{args.out}: {count:,} images, {reason}{_passed_over(args, count)}")
    if args.delete:
        print(f"{args.out}: deleted {delete_in_milvus(address, args.delete):,} images")


def _passed_over(args: Args, added: int) -> str:
    """What to say of images that the index held already."""
    partitions = read_manifest(args.embeddings)["partitions"]
    held = sum(partition["count"] for partition in partitions) - added
    return f"; {held:,} were in it already" if held else ""


def _index_photos(args: Args) -> None:
    from retrieval import index_photos

    report = index_photos(
        args.images, args.model, args.out, args.patch_sizes, args.index_type, args.device,
        args.latency_ms, args.memory_gib, args.batch_size, args.num_workers, args.on_error,
        prune=args.prune,
    )  # fmt: skip
    for line in report.lines(args.images):
        print(f"{args.out}: {line}")
    print(f"{args.out}: {report.reason}")


def _say_how_sizes_agree(args: Args) -> None:
    """What each coarse patch size finds, measured where it is not known; on stderr what is bad."""
    from retrieval import measure_agreement

    found, out = measure_agreement(args.out, device=args.device), args.out
    if found is None:
        return
    for size in found.sizes:
        if warning := found.warning(size):
            print(f"{out}: {warning}", file=sys.stderr)
        else:
            print(f"{out}: {found.line(size)}")


if __name__ == "__main__":
    main()
