"""The words of a segment's texts: a SQLite file with two FTS5 tables, written once (`fill.py`).

`word` holds the texts by words (unicode61), `dense` those parts of them that are written without
spaces, by three characters each (trigram). A row's number is its rowid. Texts are folded first, so
that both compare as `contains` does. FTS5 keeps where each word stands (`fts5vocab`); rows are
ranked by `ranking.py`, since FTS5's own bm25 knows one file alone.
"""

import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from weakref import WeakValueDictionary, finalize

import numpy as np
from jaxtyping import Int

from data.errors import UsageError
from data.files import file_digest
from retrieval.words.postings import (
    PLACES,
    Postings,
    common_name,
    read_common,
    read_places,
    rows_of,
)

KEPT_BYTES = 1 << 26  # of postings, per file; or what four words that all rows hold take
# Chinese, Japanese and Korean; Thai, Lao, Burmese and Khmer have no spaces either
_DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
DENSE = re.compile(f"[{_DENSE}]+")
A_RUN = "\ue000"  # stands among the words for a run, so that those beside it are no neighbours
GRAM = 3  # characters
WORD_TOKENIZER = "unicode61 remove_diacritics 0 categories 'L* N* Co M*'"

Table = Literal["word", "dense"]


@dataclass(frozen=True)
class Pattern:
    """Tokens that follow each other within a text."""

    table: Table
    tokens: tuple[str, ...]
    prefix: bool = False  # whether the last one may go on


@lru_cache(1)
def lacking() -> str:
    """What this Python's SQLite lacks for words, "" where it has all."""
    for needed in (f'fts5(a, tokenize="{WORD_TOKENIZER}")', 'fts5(a, tokenize="trigram")'):
        database = sqlite3.connect(":memory:")
        try:
            database.execute(f"CREATE VIRTUAL TABLE t USING {needed}")
        except sqlite3.Error as error:
            return f"SQLite {sqlite3.sqlite_version} of this Python has no FTS5 for words ({error})"
        finally:
            database.close()
    return ""


def spaced(text: str) -> str:
    """A folded text with `A_RUN` for what is written without spaces."""
    return DENSE.sub(f" {A_RUN} ", text)


class DamagedWordsError(UsageError):
    """A file of words is missing, or is not what was written."""


_opened: "WeakValueDictionary[tuple[str | int, ...], WordsFile]" = WeakValueDictionary()
_opening = threading.Lock()


def open_words(file: Path, noted: Mapping[str, Any]) -> "WordsFile":
    """A file of `retrieval.words.fill.write_words`, which returned `noted`. What is open already is
    shared, with what it remembers. Raises `UsageError` where it is missing or another."""
    with _opening:
        inode = _inode(file)  # one that was damaged and is written again is another
        if inode is None:
            raise DamagedWordsError(f"{file} is missing")
        key = (str(file.absolute()), str(noted["blake2b"]), *inode)
        found = _opened.get(key)
        if found is None:
            found = _opened[key] = WordsFile(file, noted)
        return found


def _inode(file: Path) -> tuple[int, int] | None:
    """Which file lies there; None where there is none."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


class WordsFile:
    """The words of one segment, opened. Safe for threads."""

    def __init__(self, file: Path, noted: Mapping[str, Any]) -> None:
        """See `open_words`."""
        self.file, self._blake2b = file, str(noted["blake2b"])
        self._inode = _inode(file)
        self._lock = threading.Lock()
        self._checked = False
        self._kept: OrderedDict[Pattern, Postings] = OrderedDict()
        self._kept_bytes = 0
        self._lengths: np.ndarray | None = None
        self._vocabulary: list[str] | None = None
        try:
            if file.stat().st_size != noted["bytes"]:
                raise self._damaged()
            # Opened now and never again: a later change may remove it. Nobody writes into it.
            address = f"file:{quote(str(file.absolute()))}?mode=ro&immutable=1"
            self._database = sqlite3.connect(address, uri=True, check_same_thread=False)
            finalize(self, self._database.close)
            for name in ("word", "dense"):
                self._database.execute(
                    f"CREATE VIRTUAL TABLE temp.{name}_at USING fts5vocab(main, {name}, instance)"
                )
            self._database.execute("SELECT count(*) FROM stored").fetchone()
        except FileNotFoundError as error:
            raise DamagedWordsError(f"{file} is missing") from error
        except sqlite3.Error as error:
            raise UsageError(lacking()) if lacking() else self._damaged() from error

    def _damaged(self) -> DamagedWordsError:
        return DamagedWordsError(f"{self.file} is damaged")

    def _read(self, query: str, values: tuple[Any, ...]) -> Any:
        """The one value that a query gives. The file is read whole before the first, 1 GB/s."""
        with self._lock:
            if not self._checked:
                with suppress(FileNotFoundError):  # one that a later change has taken is trusted
                    held = _inode(self.file) == self._inode
                    if held and file_digest(self.file) != self._blake2b:
                        raise self._damaged()
                self._checked = True
            try:
                return self._database.execute(query, values).fetchone()[0]
            except sqlite3.DataError as error:  # more than SQLite's 1 GB in one value
                raise UsageError(
                    f"{values[0]!r} stands in too many texts to be searched for"
                ) from error
            except (sqlite3.Error, TypeError) as error:
                raise self._damaged() from error

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of each row."""
        if self._lengths is None:
            data = self._read("SELECT value FROM stored WHERE name = ?", ("lengths",))
            self._lengths = np.frombuffer(data, "<u4").astype(np.int64)
        return self._lengths

    @property
    def vocabulary(self) -> list[str]:
        """Its words of more than two letters and nothing else."""
        if self._vocabulary is None:
            text = self._read("SELECT value FROM stored WHERE name = ?", ("vocabulary",))
            self._vocabulary = text.split()
        return self._vocabulary

    def postings(self, pattern: Pattern) -> Postings:
        """The rows that hold `pattern`, deleted ones too. Raises `UsageError` for one in
        tens of millions of places."""
        with self._lock:
            if pattern in self._kept:
                self._kept.move_to_end(pattern)
                return self._kept[pattern]
        found, four_words = self._find(pattern), 4 * 16 * len(self.lengths)
        with self._lock:
            if pattern not in self._kept:
                self._kept[pattern] = found
                self._kept_bytes += found.rows.nbytes + found.counts.nbytes
            while self._kept_bytes > max(KEPT_BYTES, four_words) and len(self._kept) > 1:
                _, (rows, counts) = self._kept.popitem(last=False)
                self._kept_bytes -= rows.nbytes + counts.nbytes
        return found

    def _find(self, pattern: Pattern) -> Postings:
        last = pattern.tokens[-1]
        if (pattern.table, len(pattern.tokens), pattern.prefix) == ("word", 1, False):
            query = "SELECT (SELECT value FROM stored WHERE name = ?)"
            if (kept := self._read(query, (common_name(last),))) is not None:
                return read_common(kept, len(self.lengths))
        places = self._places(pattern.table, last, pattern.prefix)
        for back, token in enumerate(reversed(pattern.tokens[:-1]), 1):
            before = self._places(pattern.table, token, False) + back
            places = np.intersect1d(places, before, assume_unique=True)
        return rows_of(places)

    def _places(self, table: Table, token: str, prefix: bool) -> Int[np.ndarray, " n"]:
        """Where a token stands: row, column and offset in one number."""
        wanted = "term = ?"
        values: tuple[str, ...] = (token,)
        if prefix:
            wanted, values = "term >= ? AND term < ?", (token, token + "\U0010ffff")
        query = f"SELECT {PLACES} FROM temp.{table}_at WHERE {wanted}"
        return read_places(self._read(query, values))
