"""Search an index by words or by pictures.

    python launch/search.py --index index "a red bicycle" "two dogs" -k 10 --picture hits.png
    python launch/search.py --index index photo.jpg --query-patch-size 14
    python launch/search.py --index index "a cat" --patch-size 56 --refine-patch-size 14
    python launch/search.py --index index "a cat" --where '{"size": {">": 100000}}' --json

A query that names a picture's file is looked for by the picture.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from data.errors import UsageError, exit_on_usage_error
from data.images import decode_image
from data.problems import BadSample
from data.shards.tar import IMAGE_EXTS
from retrieval.index.devices import Device
from retrieval.index.filters import parse_where
from retrieval.search.budget import Budget
from retrieval.search.contact_sheet import contact_sheet
from retrieval.search.searcher import CANDIDATES, Hit, Searcher

MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Args:
    queries: tyro.conf.Positional[tuple[str, ...]]
    """What to look for: words, or files of pictures."""
    index: str
    """Folder of the index."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Images per query."""
    patch_size: int | None = None
    """Which of the index's patch sizes answers; the finest when not given."""
    query_patch_size: int | None = None
    """How query pictures are encoded; as the index that answers when not given."""
    refine_patch_size: int | None = None
    """Encode the best candidates again at this patch size, and rank by that."""
    candidates: int = CANDIDATES
    """How many are encoded again, per query."""
    max_gflops: float | None = None
    """Instead of a patch size: what one image may cost; of a picture, the query's own encoding, of
    words, the index that answers. The finest that fits is taken."""
    max_ms: float | None = None
    """The same in milliseconds on this machine."""
    where: str = ""
    """Filter on metadata columns, as JSON: {"caption": {"contains": "cat"}}."""
    nprobe: int | None = None
    """Cells that an ivf or ivfpq index looks into; what its build measured when not given."""
    ef: int | None = None
    """Candidates on an hnsw index's walk; what its build measured when not given."""
    model: str | None = None
    """A model with the same image tower, instead of the one kept in the index."""
    picture: str = ""
    """Write a contact sheet to this PNG."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON."""
    device: Device = "auto"
    """Where to search."""


def read_picture(query: str) -> Image.Image | None:
    """The picture that a query names, None for words. Raises `UsageError` for one that cannot be
    read, and for what looks like a file's name and is none."""
    if query.rpartition(".")[2].lower() not in IMAGE_EXTS:
        return None
    if not Path(query).is_file():
        if " " in query:
            return None
        raise UsageError(f"{query}: there is no such picture")
    try:
        return decode_image(Path(query).read_bytes(), MAX_PIXELS)
    except (BadSample, OSError) as error:
        raise UsageError(f"{query} cannot be read as a picture: {error}") from error


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    with exit_on_usage_error():
        if not args.queries:
            raise UsageError(
                'nothing to look for; give at least one query, such as "a red bicycle"'
            )
        budget = None
        if args.max_gflops is not None or args.max_ms is not None:
            budget = Budget(args.max_gflops, args.max_ms)
        if budget and (args.patch_size is not None or args.query_patch_size is not None):
            raise UsageError("give patch sizes, or --max-gflops and --max-ms, not both")
        where = parse_where(args.where) if args.where else None
        pictures = [read_picture(query) for query in args.queries]
        if args.query_patch_size is not None and all(p is None for p in pictures):
            raise UsageError(
                "--query-patch-size is for pictures; words are looked for at --patch-size"
            )
        searcher = Searcher.load(args.index, args.model, args.device)
        found: list[list[Hit]] = [[] for _ in pictures]
        for by_picture in (False, True):
            rows = [n for n, p in enumerate(pictures) if (p is not None) == by_picture]
            patch_size = args.patch_size if by_picture or budget is None else budget
            query_patch_size = (budget or args.query_patch_size) if by_picture else None
            queries: list[Any] = [pictures[n] if by_picture else args.queries[n] for n in rows]
            hits = searcher.search(
                queries, args.k, patch_size,
                query_patch_size=query_patch_size,
                refine_patch_size=args.refine_patch_size, candidates=args.candidates,
                where=where, nprobe=args.nprobe, ef=args.ef,
            )  # fmt: skip
            for number, row in zip(rows, hits, strict=True):
                found[number] = row
    answers = list(zip(args.queries, found, strict=True))
    if args.as_json:
        shown = [{"query": query, "hits": [hit._asdict() for hit in row]} for query, row in answers]
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        for query, row in answers:
            print(query)
            for hit in row:
                print(f"  {hit.similarity:.3f}  {hit.caption or hit.key}  [{hit.key}]")
    if args.picture:
        with exit_on_usage_error():
            _draw(args, found)
        print(args.picture, file=sys.stderr)


def _draw(args: Args, found: list[list[Hit]]) -> None:
    try:
        contact_sheet(args.queries, found, args.picture)
    except OSError as error:
        raise UsageError(f"--picture {args.picture} cannot be written: {error}") from error


if __name__ == "__main__":
    main()
