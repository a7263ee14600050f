"""What /v1/indices says of an index's patch sizes: what each costs, and what it finds."""

from retrieval.search.searcher import Searcher
from retrieval.server.api.answers import PatchSizeCost
from retrieval.server.patch_sizes import usable_sizes


def own_patch_size(searcher: Searcher) -> int:
    """The one with which the others are compared."""
    found = searcher.agreement
    return searcher.model.vision.own_patch_size if found is None else found.own


def describe_sizes(searcher: Searcher, refuse: float) -> list[PatchSizeCost]:
    """Those of the model and of the index, coarsest first. refuse: see `ServeConfig`."""
    sizes, agreement = usable_sizes(searcher), searcher.agreement
    ms, calibration = searcher.profile.ms(sizes), searcher.calibration if refuse else None
    described = []
    for size in sizes:
        found = agreement.sizes.get(size) if agreement else None
        described.append(
            PatchSizeCost(
                patch_size=size,
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
