"""Search an index by words.

python launch/search.py --index index "a red bicycle" "two dogs" -k 10 --picture hits.png
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from data.errors import UsageError, exit_on_usage_error
from retrieval.index import Device
from retrieval.search import Searcher
from retrieval.sheet import contact_sheet


@dataclass(frozen=True)
class Args:
    queries: tyro.conf.Positional[tuple[str, ...]]
    """What to look for."""
    index: str
    """Folder of the index."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Images per query."""
    patch_size: int | None = None
    """Which of the index's patch sizes answers; the finest when not given."""
    model: str | None = None
    """A model with the same image tower, instead of the one kept in the index."""
    picture: str = ""
    """Write a contact sheet to this PNG."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON."""
    device: Device = "auto"
    """Where to search."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    with exit_on_usage_error():
        if not args.queries:
            raise UsageError(
                'nothing to look for; give at least one query, such as "a red bicycle"'
            )
        searcher = Searcher.load(args.index, args.model, args.device)
        found = searcher.search(args.queries, args.k, args.patch_size)
    if args.as_json:
        rows = [
            {"query": query, "hits": [asdict(hit) for hit in hits]}
            for query, hits in zip(args.queries, found, strict=True)
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for query, hits in zip(args.queries, found, strict=True):
            print(query)
            for hit in hits:
                print(f"  {hit.similarity:.3f}  {hit.caption or hit.key}  [{hit.key}]")
    if args.picture:
        contact_sheet(args.queries, found, args.picture)
        print(args.picture, file=sys.stderr)


if __name__ == "__main__":
    main()
