"""Which patch sizes a request means, and whether the index and the model have them."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import UsageError
from retrieval.detail import Detail
from retrieval.search.config import Budget
from retrieval.search.searcher import Searcher
from retrieval.server.refusals import RequestError
from retrieval.server.requests import PatchSizeFields, SearchRequest


@dataclass(frozen=True)
class PatchSizes:
    """The patch sizes of one search."""

    index: int  # whose vectors are searched
    query: int  # at which the query's images are encoded
    refine: int | None = None  # at which the best hits are ranked again


def choose_patch_sizes(searcher: Searcher, name: str, asked: SearchRequest) -> PatchSizes:
    """The patch sizes that a search means. Raises `RequestError` naming what is allowed."""
    images = any(t.image is not None or t.image_url is not None for t in asked.terms())
    if asked.query_patch_size is not None and not images:
        raise RequestError(400, "query_patch_size: is for images; nothing else has patches")
    usable, held = usable_sizes(searcher), searcher.patch_sizes
    budget = budget_of(asked)
    index = asked.index_patch_size or asked.patch_size
    if index is None:
        index = min(held) if images or budget is None else afford(searcher, budget, held)
    field = "patch_size" if asked.index_patch_size is None else "index_patch_size"
    check_size(field, index, held, f"index {name}")
    query = asked.query_patch_size or asked.patch_size or index
    if images and budget is not None:
        query = afford(searcher, budget, usable)
    if images and asked.query_patch_size is not None:
        check_size("query_patch_size", query, usable, "the model")
    if asked.refine_patch_size is not None:
        check_size("refine_patch_size", asked.refine_patch_size, usable, "the model")
    return PatchSizes(index, query, asked.refine_patch_size)


def usable_sizes(searcher: Searcher) -> tuple[int, ...]:
    """Those of the model and those of the index, coarsest first: a checkpoint offers its own alone,
    and may be indexed at others."""
    return tuple(sorted({*searcher.model.patch_sizes, *searcher.patch_sizes}, reverse=True))


def budget_of(asked: PatchSizeFields) -> Budget | None:
    """What an image may cost, where a request says so."""
    return Budget(asked.max_gflops, asked.max_ms) if asked.has_budget() else None


def afford(searcher: Searcher, budget: Budget, allowed: Sequence[int]) -> int:
    """The finest of `allowed` within a budget. Raises `RequestError` where none is."""
    try:
        return searcher.profile.choose(budget, allowed)
    except UsageError as error:
        raise RequestError(400, str(error)) from error


def check_size(field: str, size: Detail, allowed: Sequence[int], of: str) -> None:
    """Raises `RequestError` for a patch size that is not offered."""
    if size not in allowed:
        sizes = ", ".join(map(str, sorted(allowed, reverse=True)))
        raise RequestError(400, f"{field}: {size} is not one of {of}; allowed: {sizes}")
