"""Words that are written nearly like another: Damerau's distance (letters inserted, left out,
changed, or neighbours exchanged), of a word to a whole vocabulary at once."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt32

LONGEST = 40  # letters of a word that others are compared with


class Vocabulary:
    """Words to compare with, as rows of code points, the shorter ones first."""

    def __init__(self, words: Iterable[str]) -> None:
        held = {word for word in words if len(word) <= LONGEST}
        self._words = sorted(held, key=lambda word: (len(word), word))
        self._lengths = np.array([len(word) for word in self._words], np.int64)
        padded = [word.ljust(LONGEST, "\0") for word in self._words]
        letters = np.array(padded, f"U{LONGEST}").view(np.uint32)
        self._letters = letters.reshape(len(padded), LONGEST)

    def near(self, word: str) -> dict[int, list[str]]:
        """Distance -> words, sorted, of at most `allowed_edits`."""
        most, found = allowed_edits(word), dict[int, list[str]]()
        ends = [len(word) - most, len(word) + most + 1]
        first, end = np.searchsorted(self._lengths, ends).tolist()
        if most and first < end and len(word) <= LONGEST:
            lengths = self._lengths[first:end]
            distances = _distances(word, self._letters[first:end, : lengths[-1]], lengths)
            for row in np.flatnonzero(distances <= most):
                found.setdefault(int(distances[row]), []).append(self._words[first + row])
        return {distance: sorted(found[distance]) for distance in sorted(found)}


def allowed_edits(word: str) -> int:
    """How many letters may be wrong: one of four or five, two of more. Shorter words are near too
    many others."""
    return 0 if len(word) < 4 else 1 if len(word) < 6 else 2


def _distances(
    word: str, others: UInt32[np.ndarray, "n l"], lengths: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Optimal string alignment: of each of `others`, the fewest edits that make `word` of it.
    lengths: of the others; zeros follow."""
    columns = np.ascontiguousarray(others.T)
    last = np.repeat(np.arange(len(columns) + 1)[:, None], len(others), axis=1)
    letters = [*map(ord, word)]
    before = last
    for i, letter in enumerate(letters):
        changed = last[:-1] + (columns != letter)
        row = np.empty_like(last)
        row[0] = i + 1
        row[1:] = np.minimum(last[1:] + 1, changed)
        if i:
            swapped = (columns[1:] == letters[i - 1]) & (columns[:-1] == letter)
            row[2:] = np.where(swapped, np.minimum(row[2:], before[:-2] + 1), row[2:])
        for j in range(len(columns)):
            np.minimum(row[j + 1], row[j] + 1, out=row[j + 1])
        before, last = last, row
    return last[lengths, np.arange(len(others))]
