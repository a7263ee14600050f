"""What a query's words ask for.

    red bicycle         either word; texts with both, and with rarer words, come first
    "red bicycle"       the words in this order; only texts that hold them are found
    bicy*               words that begin so; also behind the last quote's word: "red bicy*"

Runs of Chinese, Japanese, Korean and other scripts without spaces are looked for by every two
characters of them, and whole where they are quoted.
"""

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from data.errors import UsageError
from retrieval.words.folding import folded_text
from retrieval.words.text_file import A_RUN, DENSE, GRAM, WORD_TOKENIZER, Pattern, lacking, spaced

MAX_WORDS = 64  # of a query, the first ones
LEAST_PREFIX = 2  # characters: words that begin with one letter are too many

WordQuery: TypeAlias = Sequence[tuple[str, float]]
"""Texts with weights; below 0: less of these words."""

_QUOTES = str.maketrans(dict.fromkeys("“”„‟«»「」『』", '"'))
_PART = re.compile(r'"([^"]*)"|([^\s"]+)|"')
_PREFIX = re.compile(r"\w\*(?!\w)")
_QUOTED = re.compile(r'"[^"\w]*\w[^"]*"')


@dataclass(frozen=True)
class AskedWord:
    """A pattern, what it weighs, and whether a row must hold it."""

    pattern: Pattern
    weight: float = 1.0
    required: bool = False

    @property
    def may_be_misspelt(self) -> bool:
        """Whether words that are written nearly so may stand for it."""
        (first, *others), prefix = self.pattern.tokens, self.pattern.prefix
        plain = self.pattern.table == "word" and not others and not prefix and not self.required
        return plain and first.isalpha()

    @property
    def may_be_dropped(self) -> bool:
        """Whether it is as short as "the"."""
        return self.may_be_misspelt and len(self.pattern.tokens[0]) <= 3


def marked(text: str) -> bool:
    """Whether a text has a phrase in quotes, or a word that ends in an asterisk."""
    text = text.translate(_QUOTES)
    return bool(_QUOTED.search(text) or _PREFIX.search(text))


def unmarked(text: str) -> str:
    """A text without quotes and asterisks, as a model is to read it; the same without any."""
    if not marked(text):
        return text
    return re.sub(r"(?<=\w)\*", "", text.translate(_QUOTES).replace('"', " ")).strip()


def asked_words(query: WordQuery) -> list[AskedWord]:
    """The distinct words of a query, in its order, at most `MAX_WORDS`."""
    found: dict[AskedWord, None] = {}
    for text, weight in query:
        text = folded_text(text.encode("utf-8", "replace").decode().translate(_QUOTES))
        for quoted, plain in _PART.findall(text):
            for pattern in _patterns(quoted or plain, whole=bool(quoted)):
                found[AskedWord(pattern, weight, bool(quoted) and weight > 0)] = None
    return list(found)[:MAX_WORDS]


def _patterns(text: str, whole: bool) -> Iterator[Pattern]:
    """text: folded. whole: as phrases."""
    prefix = text.rstrip().endswith("*")
    words = _tokens(spaced(text))
    prefix = prefix and bool(words) and len(words[-1]) >= LEAST_PREFIX  # `A_RUN` is shorter
    if whole and {*words} - {A_RUN}:
        yield Pattern("word", words, prefix)
    elif not whole:
        for number, word in enumerate(words, 1):
            if word != A_RUN:
                yield Pattern("word", (word,), prefix and number == len(words))
    for run in DENSE.findall(text):
        if len(run) >= GRAM and whole:
            grams = tuple(run[at : at + GRAM] for at in range(len(run) - GRAM + 1))
            yield Pattern("dense", grams)
        else:  # a gram begins at every character, so two of them are how one begins
            for at in range(max(1, len(run) - 1)):
                yield Pattern("dense", (run[at : at + 2],), prefix=True)


class _Tokenizer:
    """SQLite's own, so that queries are cut as texts were."""

    def __init__(self) -> None:
        if problem := lacking():
            raise UsageError(problem)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._database.execute(
            f"CREATE VIRTUAL TABLE asked USING fts5(a, content='', tokenize=\"{WORD_TOKENIZER}\")"
        )
        self._database.execute("CREATE VIRTUAL TABLE at USING fts5vocab(asked, instance)")

    def __call__(self, text: str) -> tuple[str, ...]:
        with self._lock:
            self._database.execute("INSERT INTO asked(rowid, a) VALUES (1, ?)", (text,))
            rows = self._database.execute("SELECT term FROM at ORDER BY offset").fetchall()
            self._database.execute("INSERT INTO asked(asked) VALUES ('delete-all')")
        return tuple(term for (term,) in rows)


@lru_cache(1)
def _tokenizer() -> _Tokenizer:
    return _Tokenizer()


def _tokens(text: str) -> tuple[str, ...]:
    """text: folded."""
    if text.isascii():  # as SQLite cuts it, and 0.3 ms sooner
        return tuple(re.findall("[a-z0-9]+", text))
    return _tokenizer()(text)
