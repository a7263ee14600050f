"""Search an index by texts or by images.

    python launch/search.py --index index "a red bicycle" "two dogs" -k 10 --picture hits.png
    python launch/search.py --index index photo.jpg --query-patch-size 14
    python launch/search.py --index index "a cat" --patch-size 56 --refine-patch-size 14
    python launch/search.py --index index photo.jpg --max-tokens 100 --refine-max-tokens 256
    python launch/search.py --index index "a cat" --regions --picture cats.png
    python launch/search.py --index index photo.jpg --box 0 0.5 0.5 1
    python launch/search.py --index index '"invoice 2023" stamp*' --words 0.5
    python launch/search.py --index index "a cat" --where '{"size": {">": 100000}}' --json

A query that is the path of an image searches by that image; quote texts, or each word is a query.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from data.errors import UsageError, exit_on_usage_error
from data.image_headers import names_image
from data.progress import say_once
from retrieval.detail import Detail, MaxTokens
from retrieval.index.config import Device
from retrieval.index_places import find_place, index_folder
from retrieval.model_folder import check_model_folder
from retrieval.regions.boxes import check_box
from retrieval.search.config import (
    CANDIDATES,
    REFUSE,
    Budget,
    PatchSizeOrBudget,
    check_share,
    check_words,
    picture_format,
)
from retrieval.search.query_images import read_query_image

if TYPE_CHECKING:
    from contrastive import LitModel
    from retrieval import Hit, Searcher


@dataclass(frozen=True)
class Args:
    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts, or paths of images."""
    index: str
    """Folder of the index, or milvus:URI/NAME."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Images per query."""
    patch_size: int | None = None
    """Which of the index's patch sizes to search. Not given: the finest."""
    query_patch_size: int | None = None
    """Patch size at which query images are encoded. Not given: the index's."""
    refine_patch_size: int | None = None
    """Re-encode the best candidates at this patch size and rank again."""
    max_tokens: int | None = None
    """Instead of a patch size: at most so many patches an image. A text is looked for at the finest
    that the index holds within it; a query image is encoded by it."""
    refine_max_tokens: int | None = None
    """Instead of --refine-patch-size."""
    candidates: int = CANDIDATES
    """How many candidates are re-encoded, per query."""
    lost: float | None = None
    """Instead of --candidates: as many as lose, on average over texts, at most this share (0.01) of
    what refining all images finds. The index must be calibrated."""
    refuse: float = REFUSE
    """Say "nothing like this here" to so large a share of texts that have an answer, and so to many
    that have none, where the index is calibrated. 0: never."""
    max_gflops: float | None = None
    """Instead of a patch size: the finest at which encoding one image costs at most this much.
    For an image query it limits the query's patch size, for a text query the index's."""
    max_ms: float | None = None
    """The same, in milliseconds on this machine."""
    where: str = ""
    """Filter on metadata columns, as JSON: {"caption": {"contains": "cat"}}."""
    words: float = 0.0
    """What the words of captions, file names and other texts count beside the vectors, 0 to 1.
    A "phrase" in quotes must be there; wor* is how a word begins."""
    regions: bool = False
    """Search parts of pictures too: each hit has the box of its best."""
    box: tuple[float, float, float, float] | None = None
    """Of query images the part that is looked for: left, top, right, bottom, from 0 to 1."""
    nprobe: int | None = None
    """Inverted lists that ivf, ivfpq and rabitq search. Not given: tuned by the build."""
    ef: int | None = None
    """efSearch, the candidates that hnsw keeps. Not given: tuned by the build."""
    model: str | None = None
    """A model with the same image tower, instead of the index's own."""
    picture: str = ""
    """Write a contact sheet to this file: .png, .jpg or .webp."""
    credit: str = ""
    """Whose images these are: at the foot of --picture, in at most two lines."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON."""
    device: Device = "auto"
    """Where to search."""
    check: bool = False
    """Read the whole index first and refuse a damaged one."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    with exit_on_usage_error(Args):
        if not args.queries or not all(query.strip() for query in args.queries):
            raise UsageError(
                'nothing to look for; give at least one query, such as "a red bicycle"'
            )
        budget = budget_of(args)
        are_images = [names_image(query) for query in args.queries]
        if args.query_patch_size is not None and not any(are_images):
            raise UsageError(
                "--query-patch-size is for images; texts are looked for at --patch-size"
            )
        if args.lost is not None and (
            refinement(args) is None or any(are_images) or args.where or args.words
        ):
            raise UsageError(
                "--lost is for texts, with --refine-patch-size or --refine-max-tokens, and without "
                "--where and --words"
            )
        if args.box is not None:
            check_box(args.box)
            if not all(are_images):
                raise UsageError("--box is for images; a text has no parts")
        if args.regions and (args.words or refinement(args) is not None):
            raise UsageError("--regions are found by one vector: no --words, and refine nothing")
        if args.lost is not None:
            index_folder(args.index, "--lost")
        if args.words:
            index_folder(args.index, "--words")
        check_share("lost", args.lost or 0.0)
        check_share("refuse", args.refuse)
        if args.picture:
            picture_format(args.picture)
        check_words(args.words)
        photos = find_place(args.index).manifest().images
        if args.model is not None:
            check_model_folder(args.model)
        found, confidences = search(args, are_images, budget)
        if args.as_json:
            print_json(args, found, confidences)
        else:
            print_lines(args, found, confidences)
        if args.picture:
            from retrieval import contact_sheet

            info = contact_sheet(args.queries, found, args.picture, args.credit).info
            lost = info["lost"]
            print(args.picture, file=sys.stderr)
            if lost:
                moved = f"; if {photos} was moved, index.py --images says where it is now"
                print(
                    f"{args.picture}: {lost:,} images cannot be found or read, {info['sought']} "
                    "among them"
                    f"{moved if photos and not Path(photos).is_dir() else ''}",
                    file=sys.stderr,
                )


def budget_of(args: Args) -> Budget | MaxTokens | None:
    """What an image may cost, where that is said in place of patch sizes."""
    budget: Budget | MaxTokens | None = None
    if args.max_gflops is not None or args.max_ms is not None:
        budget = Budget(args.max_gflops, args.max_ms)
    if args.max_tokens is not None:
        if budget is not None:
            raise UsageError("give --max-tokens, or --max-gflops and --max-ms, not both")
        budget = MaxTokens(args.max_tokens)
    if budget and (args.patch_size is not None or args.query_patch_size is not None):
        raise UsageError("give patch sizes, or --max-tokens, --max-gflops and --max-ms, not both")
    return budget


def refinement(args: Args) -> Detail | None:
    """At what the best candidates are ranked again."""
    if args.refine_max_tokens is None:
        return args.refine_patch_size
    if args.refine_patch_size is not None:
        raise UsageError("give --refine-patch-size or --refine-max-tokens, not both")
    return MaxTokens(args.refine_max_tokens)


def search(
    args: Args, are_images: list[bool], budget: Budget | MaxTokens | None
) -> "tuple[list[list[Hit]], list[float | None]]":
    """Texts together, and images together: hits, and per text of a calibrated index the confidence
    that there is something like it."""
    from retrieval import Searcher
    from retrieval.index.filters import parse_where
    from retrieval.regions.opened import HOW

    where = parse_where(args.where) if args.where else None
    read = [read_query_image(q) if i else q for q, i in zip(args.queries, are_images, strict=True)]
    searcher = Searcher.load(args.index, args.model, args.device, args.check)
    say_how_texts_are_read(args.queries, are_images, searcher.model)
    found: list[list[Hit]] = [[] for _ in read]
    confidences: list[float | None] = [None for _ in read]
    refine = refinement(args)
    for by_image in (False, True):
        rows = [n for n, is_image in enumerate(are_images) if is_image == by_image]
        queries: list[Any] = [read[n] for n in rows]
        size: PatchSizeOrBudget = args.patch_size if by_image or budget is None else budget
        if by_image and budget is not None:
            encoded = searcher.profile.encoding(budget, searcher.encodable)
            size = searcher.for_image(encoded) if isinstance(encoded, MaxTokens) else size
        candidates = args.candidates
        if args.lost is not None and not by_image:  # which --lost excludes
            candidates = keep_promise(args, searcher, size)
        options: dict[str, Any] = {
            "refine_patch_size": refine, "candidates": candidates, "where": where,
            "nprobe": args.nprobe, "ef": args.ef,
        }  # fmt: skip
        if rows and not by_image and is_judged(args, searcher):
            embeds = searcher.model.encode_text(queries).float().cpu().numpy()
            hits = searcher.search_embeds(embeds, args.k, size, **options)
            for number, confidence in zip(
                rows, searcher.confidence(embeds, hits, size), strict=True
            ):
                confidences[number] = confidence
        else:
            hits = searcher.search(
                queries, args.k, size, **options, words=args.words, regions=args.regions,
                query_patch_size=(budget or args.query_patch_size) if by_image else None,
                box=args.box if by_image else None,
            )  # fmt: skip
        for number, row in zip(rows, hits, strict=True):
            found[number] = row
        if rows and (warning := searcher.warning(size, refine, args.regions)):
            say_once(f"{warning}; {HOW.format(args.index)}" if args.regions else warning)
    return found, confidences


def is_judged(args: Args, searcher: "Searcher") -> bool:
    """Whether texts may be told that there is nothing like them."""
    by_vector = not args.words and not args.regions
    return args.refuse > 0 and by_vector and searcher.calibration is not None


def keep_promise(args: Args, searcher: "Searcher", size: PatchSizeOrBudget) -> int:
    """How many candidates lose at most --lost. Raises `UsageError` where none do."""
    fine = refinement(args)
    assert args.lost is not None
    assert fine is not None
    if searcher.calibration is None:
        raise UsageError(f"--lost: {args.index} is not calibrated; index.py --calibrate does that")
    coarse = searcher.profile.choose(size, searcher.patch_sizes)
    count = searcher.calibration.candidates(coarse, fine, args.k, args.lost)
    print(f"{count:,} candidates lose at most {args.lost:.2g} of the answers", file=sys.stderr)
    return count


def say_how_texts_are_read(
    queries: tuple[str, ...], are_images: list[bool], model: "LitModel"
) -> None:
    """A line on stderr for each text whose end is not read, or which names a folder."""
    texts = [query for query, is_image in zip(queries, are_images, strict=True) if not is_image]
    length = model.text.encoder.tower.tokenizer.context_length
    for text, is_cut in zip(texts, model.cut_texts(texts), strict=True):
        if is_cut:
            start = text if len(text) <= 60 else text[:60] + "..."
            print(f"the end of {start!r} is not searched for: the model reads {length} tokens",
                  file=sys.stderr)  # fmt: skip
        if Path(text).is_dir():
            print(f"{text!r} is searched for as words; for the images of that folder name them, "
                  f"such as {text}/*.jpg", file=sys.stderr)  # fmt: skip


def print_json(args: Args, found: "list[list[Hit]]", confidences: "list[float | None]") -> None:
    rows: list[dict[str, Any]] = []
    for query, hits, confidence in zip(args.queries, found, confidences, strict=True):
        row: dict[str, Any] = {"query": query, "hits": [hit._asdict() for hit in hits]}
        if confidence is not None:
            row |= {"found": confidence > args.refuse, "confidence": confidence}
        rows.append(row)
    print(json.dumps(rows, indent=2, ensure_ascii=False))


def print_lines(args: Args, found: "list[list[Hit]]", confidences: "list[float | None]") -> None:
    for query, hits, confidence in zip(args.queries, found, confidences, strict=True):
        print(query)
        if confidence is not None and confidence <= args.refuse:
            print(f"  nothing like this here (confidence {confidence:.2g}); the nearest:")
        if not hits:
            print("  none found")
        for hit in hits:
            words = f"  words {hit.words:.1f}" if hit.words else ""
            box = f"  box {' '.join(f'{side:.2f}' for side in hit.box)}" if hit.box else ""
            print(f"  {hit.similarity:.3f}  {hit.caption or hit.key}  [{hit.key}]{words}{box}")


if __name__ == "__main__":
    main()
