"""At which patch sizes, or within which budgets, a request is answered, and whether the index and
the model have them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import UsageError
from retrieval.detail import Detail, MaxTokens, coarse_first, finest, num_tokens
from retrieval.embed.encode import check_encodes
from retrieval.regions.opened import HOW
from retrieval.search.config import Budget
from retrieval.search.searcher import Searcher
from retrieval.server.refusals import RequestError
from retrieval.server.requests import PatchSizeFields, SearchRequest


@dataclass(frozen=True)
class PatchSizes:
    """Those of one search."""

    index: Detail  # whose vectors are searched
    query: Detail  # at which the query's images are encoded
    refine: Detail | None = None  # at which the best hits are ranked again


def choose_patch_sizes(searcher: Searcher, name: str, asked: SearchRequest) -> PatchSizes:
    """The patch sizes or budgets that a search means. Raises `RequestError` naming what is
    allowed."""
    images = any(term.is_encoded() for term in asked.terms())
    if asked.query_patch_size is not None and not images:
        raise RequestError(400, "query_patch_size: is for images; nothing else has patches")
    held, of = searcher.patch_sizes, f"index {name}"
    if asked.regions:
        held, of = _region_sizes(searcher, name), f"the regions of index {name}"
    refine = asked.refinement()
    if refine is not None:
        check_encodable("refine_", refine, searcher)
        refine = kept_detail(refine, searcher)
    budget = budget_of(asked)
    if isinstance(budget, MaxTokens) and images:
        check_encodable("", budget, searcher)
        return PatchSizes(budget if budget in held else finest(held), budget, refine)
    index: Detail | None = asked.index_patch_size or asked.patch_size
    if index is None:
        index = finest(held) if images or budget is None else afford(searcher, budget, held)
    field = "patch_size" if asked.index_patch_size is None else "index_patch_size"
    check_size(field, index, held, of)
    query: Detail = asked.query_patch_size or asked.patch_size or index
    if images and budget is not None:
        query = afford(searcher, budget)
        if isinstance(query, MaxTokens) and asked.index_patch_size is None:
            index = searcher.for_image(query)
    if images and asked.query_patch_size is not None:
        check_encodable("query_", query, searcher)
    return PatchSizes(index, query, refine)


def _region_sizes(searcher: Searcher, name: str) -> tuple[Detail, ...]:
    """Raises `RequestError` for an index without regions."""
    if searcher.regions is None:
        raise RequestError(400, f"regions: index {name} has none; {HOW.format('INDEX')}")
    return searcher.regions.patch_sizes


def budget_of(asked: PatchSizeFields) -> Budget | MaxTokens | None:
    """What an image may cost, where a request says so."""
    if asked.max_tokens is not None:
        return MaxTokens(asked.max_tokens)
    return Budget(asked.max_gflops, asked.max_ms) if asked.has_budget() else None


def afford(
    searcher: Searcher, budget: Budget | MaxTokens, held: Sequence[Detail] | None = None
) -> Detail:
    """The finest of `held` within a budget; where that is not given, at what an image may be
    encoded. Raises `RequestError` where there is none."""
    try:
        if held is not None:
            return searcher.profile.choose(budget, held)
        return searcher.profile.encoding(budget, searcher.encodable)
    except UsageError as error:
        raise RequestError(400, str(error)) from error


def check_size(field: str, size: Detail, allowed: Sequence[Detail], of: str) -> None:
    """Raises `RequestError` for a patch size or budget that is not offered."""
    if size not in allowed:
        sizes = ", ".join(map(str, coarse_first(allowed)))
        raise RequestError(400, f"{field}: {size} is not one of {of}; allowed: {sizes}")


def check_encodable(prefix: str, size: Detail, searcher: Searcher) -> None:
    """Raises `RequestError` for what images cannot be encoded at. A budget may be any number from
    the fewest to the most tokens of what is offered, so that no request costs more than these: not
    in its forward, nor in resizing the kernel, seconds for a patch of the whole image."""
    if isinstance(size, int):
        allowed = usable_sizes(searcher)
        check_size(f"{prefix}patch_size", size, allowed, "the model")
        return
    side = searcher.model.image_size
    offered = [num_tokens(known, side) for known in searcher.encodable]
    least, most = min(offered), max(offered)
    if searcher.model.vision.flexible and not least <= size.count <= most:
        raise RequestError(400, f"{prefix}max_tokens: {size.count}; allowed: {least} to {most}")
    try:
        check_encodes(searcher.model, size)
    except UsageError as error:
        raise RequestError(400, f"{prefix}max_tokens: {error}") from error


def kept_detail(refine: Detail, searcher: Searcher) -> Detail:
    """At what stored images are encoded again: for a budget, the largest square number within it,
    or one that the index holds or is calibrated for. Each keeps vectors of its own, so there must
    be few."""
    if isinstance(refine, int):
        return refine
    calibration = searcher.calibration
    known = {fine for _, fine in calibration.ranks} if calibration else set()
    known |= {MaxTokens(math.isqrt(refine.count) ** 2), *searcher.encodable}
    return max(d for d in known if isinstance(d, MaxTokens) and d <= refine)


def map_patch_sizes(searcher: Searcher) -> list[int]:
    """Those at which it can be said where in an image something is."""
    return [size for size in usable_sizes(searcher) if isinstance(size, int)]


def usable_sizes(searcher: Searcher) -> list[Detail]:
    """The patch sizes at which images can be encoded: the model's and the index's."""
    held = {size for size in searcher.patch_sizes if isinstance(size, int)}
    return coarse_first({*searcher.model.patch_sizes, *held})
