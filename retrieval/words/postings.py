"""The rows that hold a word: from the places that FTS5 keeps, or, for common words, written down.

A query's common words would cost it a second per two million places, once for each service.
"""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

COMMON_ROWS = 10_000  # and one row in 32 hold a common word
COMMON_SHARE = 1 / 32
AT_ONCE = 1 << 24  # rows whose places are read together; SQLite's values end at 1 GB
OFFSET_BITS, COLUMN_BITS = 20, 8  # of a place: row, column, offset
# One text, since a tuple per place would take five times as long.
PLACES = f"group_concat(((doc << {COLUMN_BITS}) + substr(col, 2) << {OFFSET_BITS}) + offset)"
"""SQL over an `fts5vocab` of type instance: row, column and offset of each place in one number."""


class Postings(NamedTuple):
    """The rows that hold a pattern, ascending, and how often."""

    rows: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]


def read_places(text: str | None) -> Int[np.ndarray, " p"]:
    """What `PLACES` gives."""
    return np.fromstring(text or "", np.int64, sep=",")


def rows_of(places: Int[np.ndarray, " p"]) -> Postings:
    """The rows that the places lie in."""
    return Postings(*np.unique(places >> OFFSET_BITS + COLUMN_BITS, return_counts=True))


def common_words(database: sqlite3.Connection, count: int) -> Iterator[tuple[str, bytes]]:
    """The name and the value that are stored of each common word of `count` texts, which the table
    `word` holds: a bit for each row, then row and count of those that hold it repeatedly."""
    for kind in ("row", "instance"):
        database.execute(
            f"CREATE VIRTUAL TABLE temp.word_{kind} USING fts5vocab(main, word, {kind})"
        )
    least = max(COMMON_ROWS, COMMON_SHARE * count)
    terms = database.execute("SELECT term FROM temp.word_row WHERE doc >= ?", (least,)).fetchall()
    for (term,) in terms:
        query = f"SELECT {PLACES} FROM temp.word_instance WHERE term = ? AND doc >= ? AND doc < ?"
        parts = [
            database.execute(query, (term, start, start + AT_ONCE)).fetchone()[0]
            for start in range(0, count, AT_ONCE)
        ]
        rows, counts = rows_of(np.concatenate([read_places(part) for part in parts]))
        held = np.zeros(count, bool)
        held[rows] = True
        again = np.stack([rows, counts], axis=1)[counts > 1]
        yield common_name(term), np.packbits(held).tobytes() + again.astype("<u4").tobytes()


def common_name(term: str) -> str:
    """What a common word is stored as."""
    return f"rows of {term}"


def read_common(value: bytes, count: int) -> Postings:
    """What `common_words` gives, of `count` texts."""
    size = (count + 7) // 8
    rows = np.flatnonzero(np.unpackbits(np.frombuffer(value, np.uint8, size), count=count))
    counts = np.ones(len(rows), np.int64)
    again = np.frombuffer(value, "<u4", offset=size).reshape(-1, 2).astype(np.int64)
    counts[np.searchsorted(rows, again[:, 0])] = again[:, 1]
    return Postings(rows, counts)
