"""Texts ranked by the words they share with a query: BM25 (Robertson and Zaragoza 2009, k1 1.2,
b 0.75) over every segment of an index at once.

How often a word occurs, how many texts there are and how long they are is counted over the rows of
all segments that were not deleted, so a row scores the same, to the last bit, however the rows are
spread over segments. A word in n of N texts weighs log(1 + (N - n + 1/2) / (n + 1/2)), which is
never below 0 (Lucene's form).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from retrieval.words.asked import AskedWord, WordQuery, asked_words
from retrieval.words.spelling import Vocabulary
from retrieval.words.text_file import Pattern, Postings, WordsFile

K1, B = 1.2, 0.75
MAX_SPELLINGS = 4  # that stand for a word which no text holds
MISSPELT = 0.5  # what they weigh
# A word of so many rows, and of more than half of all, finds none by itself beside a rarer one:
# ranking them would take a tenth of a second per 100,000.
MANY = 10_000


@dataclass(frozen=True)
class TextSegment:
    """A segment: its words, the ids of its rows, ascending, and which were not deleted."""

    words: WordsFile
    ids: Int[np.ndarray, " n"]
    alive: Bool[np.ndarray, " n"]


class Matches(NamedTuple):
    """Rows that share words with a query, best first, equal ones by id."""

    ids: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    required: bool = False  # whether nothing else is to be found

    def ranks(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """1 for the best, the same for equal scores; 0 for rows that share no word."""
        at = self._at(ids)
        better = np.searchsorted(-self.scores, -self.scores[at]) + 1 if len(self.ids) else at
        return np.where(at >= 0, better, 0)

    def scores_of(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """0 for rows that share no word."""
        at = self._at(ids)
        return np.where(at >= 0, self.scores[at], 0.0) if len(self.ids) else np.zeros(len(ids))

    def _at(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        if not len(self.ids):
            return np.full(len(ids), -1)
        order = np.argsort(self.ids)
        places = np.searchsorted(self.ids, ids, sorter=order).clip(max=len(order) - 1)
        return np.where(self.ids[order[places]] == ids, order[places], -1)


class TextIndex:
    """The words of all segments. Safe for threads."""

    def __init__(self, segments: Sequence[TextSegment]) -> None:
        self.segments = list(segments)

    @cached_property
    def count(self) -> int:
        """Rows that were not deleted."""
        return sum(int(segment.alive.sum()) for segment in self.segments)

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a row."""
        tokens = sum(int(one.words.lengths[one.alive].sum()) for one in self.segments)
        return max(tokens / max(self.count, 1), 1.0)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words by which misspelt ones are told."""
        return Vocabulary(chain.from_iterable(one.words.vocabulary for one in self.segments))

    def match(
        self,
        query: WordQuery,
        chosen: Sequence[Bool[np.ndarray, " _"] | None] | None = None,
        least_share: float = 0.0,
        of_best: float = 0.0,
    ) -> Matches:
        """The rows that share words with a query: of words that most rows hold (`MANY`) where it
        has no other.

        chosen: per segment the rows that may be found, None for all. least_share: of the query's
        words, each by its weight in BM25, that a row must hold; short ones that no row holds (an
        article) are not asked for. of_best: how much of what the best row holds. Neither is asked
        of rows that hold what is in quotes.
        """
        asked = [self._find(word) for word in asked_words(query)]
        most = max(MANY, self.count / 2)
        rare = [found for found in asked if found.weight > 0 and 0 < found.total <= most]
        leading = rare or [found for found in asked if found.weight > 0]
        wanted = sum(found.idf for found in asked if found.weight > 0)
        masks = chosen or [None] * len(self.segments)
        parts = [self._rank(number, asked, leading, mask) for number, mask in enumerate(masks)]
        ids = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in parts)])
        scores, shares = (
            np.concatenate([np.zeros(0), *(part[n] for part in parts)]) for n in (1, 2)
        )
        required = any(found.required for found in asked)
        if not required:
            least = max(least_share * wanted, of_best * shares.max(initial=0.0))
            ids, scores = ids[shares >= least], scores[shares >= least]
        order = np.lexsort((ids, -scores))
        return Matches(ids[order], scores[order], required)

    def _find(self, word: AskedWord) -> "_Found":
        """A word's rows in every segment; of one that no text holds, those of its nearest."""
        found = self._rows((word.pattern,))
        weight = word.weight
        if not found.total and word.may_be_misspelt:
            for near in self.vocabulary.near(word.pattern.tokens[0]).values():
                counts = {other: self._rows((Pattern("word", (other,)),)).total for other in near}
                held = sorted((-count, other) for other, count in counts.items() if count)
                if held:
                    usual = [Pattern("word", (other,)) for _, other in islice(held, MAX_SPELLINGS)]
                    found, weight = self._rows(tuple(usual)), MISSPELT * weight
                    break
        idf = math.log(1 + (self.count - found.total + 0.5) / (found.total + 0.5))
        if not found.total and word.may_be_dropped:
            idf = 0.0
        return _Found(found.postings, found.total, idf, weight, word.required)

    def _rows(self, patterns: Sequence[Pattern]) -> "_Rows":
        """The rows of any of the patterns, without deleted ones."""
        postings = []
        for segment in self.segments:
            parts = [segment.words.postings(pattern) for pattern in patterns]
            rows, counts = parts[0]
            if len(parts) > 1:
                rows, places = np.unique(
                    np.concatenate([p.rows for p in parts]), return_inverse=True
                )
                counts = np.bincount(places, np.concatenate([p.counts for p in parts]), len(rows))
            alive = segment.alive[rows]
            postings.append(Postings(rows[alive], counts[alive].astype(np.int64)))
        return _Rows(postings, sum(len(rows) for rows, _ in postings))

    def _rank(
        self,
        number: int,
        asked: Sequence["_Found"],
        leading: Sequence["_Found"],
        chosen: Bool[np.ndarray, " n"] | None,
    ) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Of the rows of one segment that hold a leading word, not sorted: ids, scores, and how
        much of the query they hold."""
        segment = self.segments[number]
        held = [found.postings[number].rows for found in leading]
        rows = np.unique(np.concatenate([np.zeros(0, np.int64), *held]))
        for found in asked:
            if found.required:
                rows = np.intersect1d(rows, found.postings[number].rows, assume_unique=True)
        if chosen is not None:
            rows = rows[chosen[rows]]
        scores, shares = np.zeros(len(rows)), np.zeros(len(rows))
        lengths = segment.words.lengths[rows]
        for found in asked:
            at, places = _common(rows, found.postings[number].rows)
            counts = found.postings[number].counts[places]
            damped = counts + K1 * (1 - B + B * lengths[at] / self.mean_length)
            scores[at] += found.weight * found.idf * counts * (K1 + 1) / damped
            if found.weight > 0:
                shares[at] += found.idf
        good = scores > 0
        return segment.ids[rows[good]], scores[good], shares[good]


def _common(
    rows: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Where the numbers that both hold stand in each; both ascend."""
    if len(rows) > len(others):
        places, at = _common(others, rows)
        return at, places
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.searchsorted(others, rows).clip(max=len(others) - 1)
    held = np.flatnonzero(others[places] == rows)
    return held, places[held]


class _Rows(NamedTuple):
    postings: list[Postings]  # of each segment
    total: int  # rows in all


class _Found(NamedTuple):
    postings: list[Postings]
    total: int
    idf: float
    weight: float
    required: bool
