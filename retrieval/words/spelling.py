"""Words that are written nearly like another: Damerau's distance (letters inserted, left out,
changed, or neighbours exchanged), of a word to a whole vocabulary at once."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int


class Vocabulary:
    """Words to compare with, as matrices of code points, one per length."""

    def __init__(self, words: Iterable[str]) -> None:
        by_length: dict[int, list[str]] = {}
        for word in sorted(set(words)):
            by_length.setdefault(len(word), []).append(word)
        self._words = by_length
        self._letters = {
            length: np.array([list(map(ord, word)) for word in words], np.int32)
            for length, words in by_length.items()
        }

    def near(self, word: str) -> dict[int, list[str]]:
        """Distance -> words, sorted, of at most `allowed_edits`."""
        most = allowed_edits(word)
        found: dict[int, list[str]] = {}
        for length in range(len(word) - most, len(word) + most + 1):
            if most and length in self._words:
                distances = _distances(np.array(list(map(ord, word))), self._letters[length])
                for row in np.flatnonzero(distances <= most):
                    found.setdefault(int(distances[row]), []).append(self._words[length][row])
        return {distance: sorted(found[distance]) for distance in sorted(found)}


def allowed_edits(word: str) -> int:
    """How many letters may be wrong: none of two, one of three to five, two of more, as in
    Lucene's automatic fuzziness."""
    return 0 if len(word) < 3 else 1 if len(word) < 6 else 2


def _distances(
    word: Int[np.ndarray, " m"], others: Int[np.ndarray, "n l"]
) -> Int[np.ndarray, " n"]:
    """Optimal string alignment: of each of `others`, the fewest edits that make `word` of it."""
    length = others.shape[1]
    before = np.zeros((length + 1, len(others)), np.int32)
    last = np.repeat(np.arange(length + 1, dtype=np.int32)[:, None], len(others), axis=1)
    for i, letter in enumerate(word):
        row = np.empty_like(last)
        row[0] = i + 1
        for j in range(length):
            row[j + 1] = np.minimum(
                np.minimum(last[j + 1], row[j]) + 1, last[j] + (others[:, j] != letter)
            )
            if i and j:
                swapped = (others[:, j] == word[i - 1]) & (others[:, j - 1] == letter)
                row[j + 1] = np.where(
                    swapped, np.minimum(row[j + 1], before[j - 1] + 1), row[j + 1]
                )
        before, last = last, row
    return last[length]
