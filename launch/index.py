"""Build or change a searchable index of embeddings or of a folder of photos.

    python launch/index.py --embeddings embeddings --out index [--index-type auto] [--latency-ms 10]
    python launch/index.py --images photos --model runs/demo/model --out index     # and again
    python launch/index.py --out index --embeddings more --add
    python launch/index.py --out index --delete 17 4294967301 --compact
    python launch/index.py --out index --regions    # parts of its pictures can be found too
    python launch/index.py --out index --words      # of an index by 0.1.0, or damaged ones
    python launch/index.py --embeddings embeddings --out milvus:http://localhost:19530/photos

With --images, running it again picks up new, changed and deleted photos, and a folder that was
moved. An index can be changed while it is being searched.
"""

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from data.config import NUM_WORKERS, Fit, OnError
from data.errors import UsageError, exit_on_usage_error, short_list
from data.files import make_folder
from retrieval.detail import MaxTokens, said_pair
from retrieval.embed.config import BATCH_SIZE, check_batches, check_sizes
from retrieval.embed.manifest import read_manifest
from retrieval.index.config import LATENCY_MS, Device, IndexTypeChoice, check_limits
from retrieval.index_places import find_place, regions_folder
from retrieval.milvus.address import is_address, parse_address
from retrieval.model_folder import check_model_folder
from retrieval.search.config import LOST, REFUSE, read_texts


@dataclass(frozen=True)
class Args:
    out: Annotated[str, tyro.conf.arg(aliases=["--index"])]
    """Folder of the index; or milvus:URI/NAME, where embeddings are added and ids deleted too."""
    embeddings: str = ""
    """Folder written by launch/embed.py."""
    images: str = ""
    """Folder of photos; KEY.txt beside a photo is its caption."""
    model: str = ""
    """open_clip:ARCHITECTURE@TAG or @FILE, transformers:FOLDER, or a model's folder. Not given: the
    one that the embeddings name."""
    index_type: IndexTypeChoice | None = None
    """flat and flat16 are exact; the others approximate; auto picks and says why. Not given: auto;
    with --compact the index's own."""
    latency_ms: float | None = None
    """Time that one query may take; auto picks by it. Not given: 10; with --compact the
    index's own."""
    memory_gib: float | None = None
    """Memory that the index may take. 0, or not given: half of the CPU's or GPUs' memory;
    not given with --compact: the index's own."""
    device: Device = "auto"
    """Where FAISS trains, and what auto picks the index type for."""
    patch_sizes: tuple[int, ...] = ()
    """With --images or --regions: patch sizes in pixels. Empty: all of the model's."""
    max_tokens: tuple[int, ...] = ()
    """With --images, instead of patch sizes: at most so many patches an image."""
    fit: Fit | None = None
    """With --images: crop, squash or aspect, as of launch/embed.py."""
    prune: bool = False
    """With --images: drop photos of folders that are empty, missing or cannot be listed."""
    add: bool = False
    """Add the embeddings to an existing index."""
    delete: tuple[int, ...] = ()
    """Ids to delete."""
    compact: bool = False
    """Merge additions and deletions into the index; with another --index-type, --latency-ms or
    --memory-gib build it anew by these."""
    words: bool = False
    """Index the words of an existing index's texts where that has not been done."""
    regions: bool = False
    """Index parts of the pictures too, at --patch-sizes of the index, else at its coarsest; once
    there are some, each run brings them up to date."""
    calibrate: bool = False
    """Measure when a text has no answer here, and how many candidates coarse to fine needs, by the
    images' captions; again by itself once a fifth of the images has changed."""
    texts: str = ""
    """With --calibrate: a file of texts that the images answer, one a line, instead of captions."""
    refine_patch_size: int | None = None
    """With --calibrate: also a patch size that the index does not hold; all images are encoded."""
    refine_max_tokens: int | None = None
    """The same, by a budget of tokens."""
    batch_size: int = BATCH_SIZE
    """With --images: images read together; 0: 64, on a GPU 512."""
    num_workers: int = NUM_WORKERS
    """With --images: loader processes."""
    on_error: OnError = "skip"
    """With --images: skip and count unreadable photos and captions, or stop at the first."""


# The actions that use a flag. `build` is --embeddings without --add.
USED_BY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model",): ("images", "build"),
    ("index_type", "latency_ms", "memory_gib"): ("images", "build", "compact"),
    ("patch_sizes",): ("images", "regions"),
    ("max_tokens", "fit", "prune", "batch_size", "num_workers", "on_error"): ("images",),
    ("texts", "refine_patch_size", "refine_max_tokens"): ("calibrate",),
}
OF_IMAGES = {"patch_sizes", "max_tokens", "fit"}  # which embeddings have already
IN_MILVUS = {"out", "embeddings", "model", "index_type", "add", "delete"}


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
    if args.images and not args.model:
        raise UsageError("--images needs --model, which looks at them")
    if None not in (args.refine_patch_size, args.refine_max_tokens):
        raise UsageError("give --refine-patch-size or --refine-max-tokens, not both")
    changes = args.delete or args.compact or args.words or args.regions or args.calibrate
    if not (args.embeddings or args.images or changes):
        raise UsageError(
            "nothing to do: give --embeddings, --images, --delete, --compact, --words, --regions "
            "or --calibrate"
        )
    given = [f.name for f in fields(args) if getattr(args, f.name) != f.default]
    if is_address(args.out):
        for name in given:
            if name not in IN_MILVUS:
                raise UsageError(
                    f"{_flag(name)} is for a folder; Milvus takes --embeddings and --delete"
                )
    check_used(args, given)
    check_limits(args.latency_ms, args.memory_gib)
    if args.texts:
        read_texts(args.texts)
    if args.images:
        check_batches(args.batch_size, args.num_workers)
        check_sizes(args.patch_sizes, args.max_tokens)
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
    if args.images and not args.compact and (Path(args.out) / "manifest.json").is_file():
        check_same_type(args)


def check_used(args: Args, given: list[str]) -> None:
    """Raises `UsageError` for a flag that nothing of what is asked for uses."""
    build = bool(args.embeddings) and not args.add
    for names, actions in USED_BY.items():
        if any(build if action == "build" else getattr(args, action) for action in actions):
            continue
        for name in names:
            if name in given:
                needs = [
                    "--embeddings without --add" if action == "build" else _flag(action)
                    for action in actions
                ]
                why = "; embeddings have theirs" if args.embeddings and name in OF_IMAGES else ""
                raise UsageError(f"{_flag(name)} needs {' or '.join(needs)}{why}")


def check_same_type(args: Args) -> None:
    """Raises `UsageError` for what adding photos to an index does not change of it."""
    held = find_place(args.out).manifest()
    memory = int((args.memory_gib or 0) * 2**30)
    for name, asked, before in (
        ("index_type", args.index_type, held.asked_type),
        ("latency_ms", args.latency_ms, held.latency_ms),
        ("memory_gib", memory / 2**30, held.memory_bytes / 2**30),
    ):
        if asked and asked != before:
            raise UsageError(
                f"{args.out} was made with {name}={before}, not {asked}; with --compact too, it "
                "is built anew"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main() -> None:
    args = parse()
    with exit_on_usage_error(Args):
        check(args)
        if is_address(args.out):
            _change_milvus(args)
            return
        deleted = True

        from retrieval import add_embeddings, build_index, compact_index, index_words

        if args.images:
            _index_photos(args)
        elif args.add:
            added = add_embeddings(args.out, args.embeddings)
            print(f"{args.out}: added {added:,} images{_passed_over(args, added)}")
        elif args.embeddings:
            reason = build_index(args.embeddings, args.out, args.model, *_how(args))
            count = find_place(args.out).manifest().count
            print(f"{args.out}: {reason}{_passed_over(args, count)}")
        if args.images or (args.embeddings and not args.add):
            _say_how_it_searches(args)
        if args.images or args.embeddings:
            _say_how_sizes_agree(args)
        if args.delete:
            deleted = _delete(args)
        if args.compact:
            asked = (args.index_type, args.latency_ms, args.memory_gib)
            print(f"{args.out}: {compact_index(args.out, args.device, *asked)}")
            _say_how_it_searches(args)
        if args.words:
            print(f"{args.out}: indexed the words of {index_words(args.out):,} images")
        _index_regions(args)
        _calibrate(args)
        if not deleted:  # last, as the same command may have been ended before the rest of it
            raise none_held(args)


def none_held(args: Args) -> UsageError:
    return UsageError(f"{args.out} holds none of the ids to delete: {short_list(args.delete)}")


def _change_milvus(args: Args) -> None:
    from retrieval.milvus.write import add_to_milvus, build_in_milvus

    address = parse_address(args.out)
    if args.add:
        added = add_to_milvus(address, args.embeddings)
        print(f"{args.out}: added {added:,} images{_passed_over(args, added)}")
    elif args.embeddings:
        type_ = args.index_type or "auto"
        reason = build_in_milvus(args.embeddings, address, args.model, type_)
        count = find_place(args.out).manifest().count
        print(f"{args.out}: {count:,} images, {reason}{_passed_over(args, count)}")
    if args.delete and not _delete(args):
        raise none_held(args)


def _how(args: Args) -> tuple[IndexTypeChoice, Device, float, float]:
    """What a new index is made by."""
    latency_ms = LATENCY_MS if args.latency_ms is None else args.latency_ms
    return args.index_type or "auto", args.device, latency_ms, args.memory_gib or 0.0


def _delete(args: Args) -> bool:
    """Whether the index held any of the ids; say which ones it did not."""
    asked = list(dict.fromkeys(args.delete))
    if is_address(args.out):
        from retrieval.milvus.write import delete_in_milvus

        deleted, absent = delete_in_milvus(parse_address(args.out), asked), []
    else:
        from retrieval.index.build import absent_ids, delete_ids

        absent = absent_ids(args.out, asked)
        deleted = delete_ids(args.out, asked)
    if not deleted:
        return False
    lost = len(asked) - deleted
    which = f" the ids {short_list(absent)}" if absent else f" {lost:,} of these ids"
    print(f"{args.out}: deleted {deleted:,} images{f'; it does not hold{which}' if lost else ''}")
    return True


def _passed_over(args: Args, added: int) -> str:
    """What to say of images that the index held already."""
    partitions = read_manifest(args.embeddings)["partitions"]
    held = sum(partition["count"] for partition in partitions) - added
    return f"; {held:,} were in it already" if held else ""


def _index_photos(args: Args) -> None:
    from retrieval import index_photos

    report = index_photos(
        args.images, args.model, args.out, args.patch_sizes, *_how(args), args.batch_size,
        args.num_workers, args.on_error, prune=args.prune, max_tokens=args.max_tokens, fit=args.fit,
    )  # fmt: skip
    for line in report.lines(args.images):
        print(f"{args.out}: {line}")
    print(f"{args.out}: {report.reason}")


def _say_how_it_searches(args: Args) -> None:
    """How far an approximate index looks, and what it was tuned by."""
    manifest = find_place(args.out).manifest()
    for size in manifest.patch_sizes:
        if line := manifest.tuning_line(size):
            print(f"{args.out}: {line}")


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


def _index_regions(args: Args) -> None:
    """Where they are asked for, or there are some, whose pictures may have changed."""
    if not args.regions and not regions_folder(Path(args.out)).is_dir():
        return
    from retrieval import index_regions

    sizes = args.patch_sizes if args.regions and not args.images else ()
    report = index_regions(args.out, sizes, device=args.device)
    print(f"{args.out}: {report.line()}")


def _calibrate(args: Args) -> None:
    """Where it is asked for, or was and the index has changed since; say what came of it."""
    from retrieval import calibrate_index, recalibrate

    if args.calibrate:
        tokens = args.refine_max_tokens
        found = calibrate_index(
            args.out, device=args.device, texts=read_texts(args.texts) if args.texts else (),
            fine=args.refine_patch_size if tokens is None else MaxTokens(tokens),
        )  # fmt: skip
    else:
        again = recalibrate(args.out, device=args.device)
        if again is None:
            return
        found = again
    for size in found.present:
        print(f"{args.out}: {found.line(size, REFUSE)}")
    for coarse, fine in found.ranks:
        try:
            count = found.candidates(coarse, fine, min(10, len(found.ranks[coarse, fine][0])), LOST)
        except UsageError as error:
            print(f"{args.out}: {error}")
        else:
            print(
                f"{args.out}: {said_pair(coarse, fine)}: {count:,} candidates lose at most "
                f"{LOST:.0%} of the first ten"
            )


if __name__ == "__main__":
    main()
