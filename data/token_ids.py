"""Token ids of several texts as one flat array, so that no step works text by text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Texts of n tokens in all: text i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Int[np.ndarray, " n"]  # int32; may hold more than these texts, before and after them
    offsets: Int[np.ndarray, " bounds"]  # int64, ascending; b + 1 of them

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "TokenIds":
        """Of one list of ids per text, as tokenizers give them."""
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        values = np.fromiter((i for text in texts for i in text), np.int32, int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def empty(cls, size: int) -> "TokenIds":
        """`size` texts without a token."""
        return cls(np.zeros(0, dtype=np.int32), np.zeros(size + 1, dtype=np.int64))

    @classmethod
    def join(cls, parts: "Sequence[TokenIds]") -> "TokenIds":
        """The texts of one part after those of another."""
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *(part.lengths for part in parts)])
        values = np.concatenate([p.values[p.offsets[0] : p.offsets[-1]] for p in parts])
        return cls(values, np.cumsum(lengths))

    @property
    def lengths(self) -> Int[np.ndarray, " b"]:
        """Tokens of each text."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> "TokenIds":
        """Consecutive texts, without a copy."""
        start, stop, _ = rows.indices(len(self))
        return TokenIds(self.values, self.offsets[start : max(start, stop) + 1])

    def take(self, rows: Int[np.ndarray, " m"]) -> "TokenIds":
        """These texts, in this order."""
        values, offsets = gather(self.values, self.offsets, rows)
        return TokenIds(values, offsets)

    def padded(
        self, length: int, pad_id: int
    ) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "b n"]]:
        """int64 ids, padded to `length` on the right, and 1 where text, 0 where padding.

        Raises `ValueError` for a text of more than `length` tokens.
        """
        if len(self) and int(self.lengths.max()) > length:
            raise ValueError(f"a text of {self.lengths.max()} tokens, padded to {length}")
        is_text = np.arange(length) < self.lengths[:, None]
        ids = np.full(is_text.shape, pad_id, dtype=np.int64)
        ids[is_text] = self.values[self.offsets[0] : self.offsets[-1]]
        return ids, is_text.astype(np.int64)

    def tolist(self) -> list[list[int]]:
        """A list of ids per text."""
        return [self.values[a:b].tolist() for a, b in pairwise(self.offsets.tolist())]


def gather(
    values: Int[np.ndarray, " n"], offsets: Int[np.ndarray, " bounds"], rows: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " m+1"]]:
    """Rows of a list with offsets as a new one: its values, and its offsets from 0."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    ends = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    places = np.repeat(starts - ends[:-1], lengths)
    places += np.arange(len(places))
    return values[places], ends
