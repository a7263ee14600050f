"""Which classes of a decoder are which of a data set, by their names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from data.dense.picture import BACKGROUND, MOST_CLASSES
from data.errors import UsageError

NAMED = 5  # of the classes that a sentence lists


@dataclass(frozen=True)
class MatchedNames:
    """Labels by which a segmenter's masks are judged by a data set's."""

    labels: UInt8[np.ndarray, " k"]
    """Of the segmenter's own, background first: the data set's. `BACKGROUND` for those without."""
    unknown: tuple[str, ...]
    """The segmenter's classes that the data set has not."""
    never_found: tuple[str, ...]
    """The data set's that the segmenter has not."""

    def sentence(self) -> str:
        """How they differ; "" where they do not."""
        parts = []
        if self.unknown:
            parts.append(
                f"{_listed(self.unknown)}, which the decoder finds and the set does not have, "
                "counts as background"
            )
        if self.never_found:
            parts.append(f"{_listed(self.never_found)}, which the decoder does not know, as missed")
        return "; ".join(parts)


def match_names(own: Sequence[str], wanted: Sequence[str]) -> MatchedNames:
    """own: a segmenter's class names. wanted: a data set's. In any case and spacing; of a name that
    repeats, the first is the first, and so on.

    Raises `UsageError` where none is shared, and for more than masks hold.
    """
    if len(wanted) > MOST_CLASSES:
        raise UsageError(f"{len(wanted):,} classes; masks of 8 bits hold {MOST_CLASSES}")
    places = {key: label for label, key in enumerate(_keys(wanted), 1)}
    labels = [places.get(key, BACKGROUND) for key in _keys(own)]
    if not any(labels):
        raise UsageError(
            f"none of the decoder's classes ({_listed(own)}) is one of the set's "
            f"({_listed(wanted)}); they are matched by name"
        )
    return MatchedNames(
        np.array([BACKGROUND, *labels], np.uint8),
        tuple(name for name, label in zip(own, labels, strict=True) if label == BACKGROUND),
        tuple(name for label, name in enumerate(wanted, 1) if label not in labels),
    )


def _keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """Of each name, and how often it stood before."""
    seen, keys = Counter[str](), []
    for name in names:
        folded = " ".join(name.casefold().split())
        keys.append((folded, seen[folded]))
        seen[folded] += 1
    return keys


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
