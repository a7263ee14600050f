"""Words and vectors together: reciprocal rank fusion (Cormack, Clarke and Buettcher 2009).

An image at rank v of the vectors and rank w of the words scores (1 - words) / (60 + v) + words /
(60 + w); a part is nothing where the image is not in that list. Equal scores of words share a rank.
The vectors' list is of fixed length, so that an image scores the same on every page of an answer.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from retrieval.detail import Detail
from retrieval.index.filters import Where
from retrieval.index_interface import IndexState
from retrieval.words.asked import WordQuery

RANK_OFFSET = 60  # k in the paper
DEPTH = 200  # ranks of the vectors that count
# What a text must hold to be fused, for the vectors have something to offer too: so much of the
# query's words by weight, and of what the best text holds.
LEAST_SHARE, OF_BEST = 0.5, 0.9

Found = tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]


class Fusion:
    """The words of a batch of queries, matched once, and how they join what the vectors find."""

    def __init__(
        self,
        snapshot: IndexState,
        queries: Sequence[WordQuery],
        words: float,
        where: Where | None = None,
    ) -> None:
        """queries: of each vector its texts, perhaps none. words: their weight, above 0 to 1."""
        self._snapshot, self._words, self._where = snapshot, words, where
        least = (LEAST_SHARE, OF_BEST) if words < 1 else (0.0, 0.0)
        self._matches = [snapshot.matching_words(query, where, *least) for query in queries]
        self._by_words = [words if query else 0.0 for query in queries]

    def candidates(
        self,
        embeds: Float[np.ndarray, "q d"],
        count: int,
        patch_size: Detail,
        nprobe: int | None,
        ef: int | None,
    ) -> Found:
        """The best `count` of the vectors' and the words' images: their similarities, and ids; -1
        where there are fewer."""
        depth = max(count, DEPTH)
        similarities, ids = self._nearest(embeds, depth, patch_size, nprobe, ef)
        lines = []
        for number, matches in enumerate(self._matches):
            found = ids[number][ids[number] >= 0]
            more = np.setdiff1d(matches.ids[:depth], found, assume_unique=True)
            own = self._snapshot.vectors(more.tolist(), patch_size) @ embeds[number]
            alike = np.concatenate([similarities[number][: len(found)], own])
            lines.append((alike.astype(np.float32), np.concatenate([found, more])))
        return self.ranked(*_rectangle(lines), count)

    def ranked(
        self,
        similarities: Float[np.ndarray, "q c"],
        ids: Int[np.ndarray, "q c"],
        count: int,
    ) -> Found:
        """The best `count` of some candidates, by the ranks of their similarities and words."""
        lines = []
        for number, matches in enumerate(self._matches):
            there = ids[number] >= 0
            own, alike = ids[number][there], similarities[number][there]
            scores = fused(_ranks(alike, own), matches.ranks(own), self._by_words[number])
            order = np.lexsort((own, -alike, -scores))
            if self._by_words[number] == 1:
                order = order[scores[order] > 0]
            lines.append((alike[order[:count]], own[order[:count]]))
        return _rectangle(lines)

    def scores(self, ids: Int[np.ndarray, "q k"]) -> Float[np.ndarray, "q k"]:
        """What the words alone say of images: BM25, 0 for none of them."""
        lines = [m.scores_of(line) for m, line in zip(self._matches, ids, strict=True)]
        return np.stack(lines)

    def _nearest(
        self,
        embeds: Float[np.ndarray, "q d"],
        depth: int,
        patch_size: Detail,
        nprobe: int | None,
        ef: int | None,
    ) -> Found:
        """Of the vectors: for a query with words in quotes among the images that have these."""
        plain = np.array([not matches.required for matches in self._matches])
        similarities = np.full((len(embeds), depth), -np.inf, np.float32)
        ids = np.full((len(embeds), depth), -1)
        if plain.any():
            similarities[plain], ids[plain] = self._snapshot.nearest(
                embeds[plain], depth, patch_size, self._where, nprobe, ef
            )
        for number in np.flatnonzero(~plain):
            held = self._matches[number].ids

            def among(every: np.ndarray, held: np.ndarray = held) -> np.ndarray:
                return np.isin(every, held)

            (similarities[number],), (ids[number],) = self._snapshot.nearest(
                embeds[number : number + 1], depth, patch_size, among, nprobe, ef
            )
        return similarities, ids


def fused(
    by_vector: Int[np.ndarray, " n"], by_words: Int[np.ndarray, " n"], words: float
) -> Float[np.ndarray, " n"]:
    """Scores of images at these ranks, 1 for the best, 0 for those not in a list."""
    parts = []
    for ranks, weight in ((by_vector, 1 - words), (by_words, words)):
        parts.append(np.where(ranks > 0, weight / (RANK_OFFSET + ranks), 0.0))
    return parts[0] + parts[1]


def _ranks(similarities: Float[np.ndarray, " n"], ids: Int[np.ndarray, " n"]) -> np.ndarray:
    """1 for the most similar, equal ones by id; 0 beyond `DEPTH`."""
    ranks = np.empty(len(ids), np.int64)
    ranks[np.lexsort((ids, -similarities))] = np.arange(1, len(ids) + 1)
    return np.where(ranks <= DEPTH, ranks, 0)


def _rectangle(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> Found:
    """Lines of different lengths, -1 behind the shorter ones."""
    width = max((len(ids) for _, ids in lines), default=0)
    similarities = np.full((len(lines), width), -np.inf, np.float32)
    ids = np.full((len(lines), width), -1)
    for number, (alike, own) in enumerate(lines):
        similarities[number, : len(own)], ids[number, : len(own)] = alike, own
    return similarities, ids
