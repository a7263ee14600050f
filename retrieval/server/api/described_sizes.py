"""What /v1/indices says of an index's patch sizes: what each costs, and what it finds."""

from retrieval.detail import Detail, MaxTokens, answered, num_tokens
from retrieval.search.searcher import Searcher
from retrieval.server.api.answers import PatchSizeCost


def own_size(searcher: Searcher) -> Detail:
    """The one with which the others are compared."""
    if (found := searcher.agreement) is not None:
        return found.own
    own = searcher.model.vision.own_patch_size
    by_tokens = any(isinstance(size, MaxTokens) for size in searcher.patch_sizes)
    return MaxTokens(num_tokens(own, searcher.model.image_size)) if by_tokens else own


def describe_sizes(searcher: Searcher, refuse: float) -> list[PatchSizeCost]:
    """Those of the model and of the index, coarsest first. refuse: see `ServeConfig`."""
    sizes, agreement = searcher.encodable, searcher.agreement
    ms, calibration = searcher.profile.ms(sizes), searcher.calibration if refuse else None
    described = []
    for size in sizes:
        found = agreement.sizes.get(size) if agreement else None
        described.append(
            PatchSizeCost(
                **answered("", size),
                in_index=size in searcher.patch_sizes,
                neighbours=None if found is None else round(found.neighbours, 4),
                candidates=None
                if found is None or found.candidates is None
                else round(found.candidates, 4),
                warning=agreement.warning(size) if agreement else "",
                refusals=calibration.line(size, refuse) if calibration else "",
                gflops=round(searcher.profile.gflops(size), 3),
                ms=round(ms[size], 3),
            )
        )
    return described
