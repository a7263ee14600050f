"""One state of an index, with what is kept beside it, and what a search asks of it."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from contrastive.model.lit import LitModel
from data.shards.location import ImageLocation
from retrieval.detail import Detail
from retrieval.embed.encode import check_encodes
from retrieval.index.filters import Where
from retrieval.index_interface import IndexState
from retrieval.regions.opened import Regions
from retrieval.search.calibrated import Calibrated
from retrieval.search.hit import Hit
from retrieval.search.refine import FineVectors, rank_again


class OpenedIndex(NamedTuple):
    """A search ends on the state that it began with, whatever is opened meanwhile."""

    snapshot: IndexState
    fine: FineVectors
    calibrated: Calibrated
    regions: Regions | None

    def refine(
        self,
        model: LitModel,
        queries: Float[np.ndarray, "q d"],
        similarities: Float[np.ndarray, "q c"],
        ids: Int[np.ndarray, "q c"],
        patch_size: Detail,
    ) -> tuple[Float[np.ndarray, "q c"], Int[np.ndarray, "q c"]]:
        """The candidates, ranked again by what images are at a patch size."""
        check_encodes(model, patch_size)
        distinct = np.unique(ids[ids >= 0]).tolist()
        if patch_size in self.snapshot.patch_sizes:
            vectors = dict(self.snapshot.known_vectors(distinct, patch_size))
        else:
            rows = self.snapshot.rows(distinct)
            vectors = self.fine.get({row["id"]: ImageLocation.of(row) for row in rows}, patch_size)
        return rank_again(queries, similarities, ids, vectors)

    def in_regions(
        self,
        parts: Regions,
        embeds: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        where: Where | None,
        nprobe: int | None,
        ef: int | None,
    ) -> list[list[Hit]]:
        """Pictures by their most similar part, which is the hit's `box`."""
        found = parts.nearest(embeds, k, patch_size, where, nprobe, ef)
        hits = self.hits(found.similarities, found.ids, np.zeros(found.ids.shape))
        boxes = iter(parts.boxes(found.regions[found.ids >= 0]))
        return [[hit._replace(box=next(boxes)) for hit in row] for row in hits]

    def hits(
        self,
        similarities: Float[np.ndarray, "q k"],
        ids: Int[np.ndarray, "q k"],
        by_words: Float[np.ndarray, "q k"],
    ) -> list[list[Hit]]:
        """Those whose id is none, -1, are left out."""
        present = ids >= 0
        kept: Sequence[float] = similarities[present].tolist()
        rows = map(Hit.of, kept, self.snapshot.rows(ids[present]), by_words[present].tolist())
        return [list(islice(rows, count)) for count in present.sum(axis=1).tolist()]
