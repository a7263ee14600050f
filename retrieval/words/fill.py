"""Writing the words of a segment's texts, see `text_file.py`."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from data.errors import UsageError
from data.files import file_digest
from retrieval.words.folding import folded
from retrieval.words.postings import COLUMN_BITS, common_words
from retrieval.words.text_file import DENSE, GRAM, WORD_TOKENIZER, lacking, spaced

NOT_SEARCHED = frozenset({"shard"})  # the same for thousands of rows
MAX_CHARACTERS = 100_000  # of a text; what follows is not searched
_PADDING = " " * (GRAM - 1)  # behind a run, so that a gram begins at each of its characters


def text_columns(schema: pa.Schema) -> list[str]:
    """The columns whose words are searched."""

    def is_text(type_: pa.DataType) -> bool:
        if pa.types.is_dictionary(type_):
            type_ = type_.value_type
        return pa.types.is_string(type_) or pa.types.is_large_string(type_)

    found = [field.name for field in schema if is_text(field.type)]
    return [name for name in found if name not in NOT_SEARCHED][: 1 << COLUMN_BITS]


def write_words(file: Path, table: pa.Table) -> dict[str, Any]:
    """Write the words of the texts of `table`; returns the file's `bytes` and `blake2b`.

    Raises `UsageError` where it cannot be written, or SQLite has no FTS5.
    """
    if problem := lacking():
        raise UsageError(problem)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    try:
        database = sqlite3.connect(part, isolation_level=None)
        try:
            _fill(database, table)
        finally:
            database.close()
    except sqlite3.Error as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{part} cannot be written ({error}); is the disk full?") from error
    part.replace(file)
    return {"bytes": file.stat().st_size, "blake2b": file_digest(file)}


def _fill(database: sqlite3.Connection, table: pa.Table) -> None:
    names = text_columns(table.schema)
    columns = ", ".join(f"c{number}" for number in range(len(names)))
    marks = ", ".join("?" for _ in range(len(names) + 1))
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("BEGIN")
    for name, tokenizer in (("word", WORD_TOKENIZER), ("dense", "trigram")):
        database.execute(
            f"CREATE VIRTUAL TABLE {name} USING fts5({columns}, content='', detail=full, "
            f'tokenize="{tokenizer}")'
        )
        database.execute(f"INSERT INTO {name}({name}, rank) VALUES ('hashsize', {1 << 26})")
    start = 0
    for batch in table.select(names).to_batches():
        texts = [_searched(column) for column in batch.columns]
        words, dense = (list(part) for part in zip(*texts, strict=True))
        rows = range(start, start + len(batch))
        database.executemany(
            f"INSERT INTO word(rowid, {columns}) VALUES ({marks})",
            zip(rows, *words, strict=True),
        )
        database.executemany(
            f"INSERT INTO dense(rowid, {columns}) VALUES ({marks})",
            (row for row in zip(rows, *dense, strict=True) if any(row[1:])),
        )
        start += len(batch)
    for name in ("word", "dense"):
        database.execute(f"INSERT INTO {name}({name}) VALUES ('optimize')")
    lengths = _lengths(database, len(table))
    common = list(common_words(database, len(table)))
    terms = (term for (term,) in database.execute("SELECT term FROM temp.word_row"))
    vocabulary = " ".join(term for term in terms if term.isalpha() and len(term) > 2)
    database.execute("CREATE TABLE stored (name TEXT PRIMARY KEY, value BLOB)")
    values = [("lengths", lengths.astype("<u4").tobytes()), ("vocabulary", vocabulary), *common]
    database.executemany("INSERT INTO stored VALUES (?, ?)", values)
    database.execute("COMMIT")


def _searched(column: pa.Array) -> tuple[list[str], list[str]]:
    """Of each text what goes by words, and what by characters."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = pc.fill_null(pc.utf8_slice_codeunits(column, 0, MAX_CHARACTERS), "")
    if pc.all(pc.string_is_ascii(column)).as_py() is not False:
        texts = column.to_pylist()
        return texts, [""] * len(texts)
    texts = folded(column).to_pylist()
    dense = [_PADDING.join([*DENSE.findall(text), ""]) for text in texts]
    pairs = zip(texts, dense, strict=True)
    return [spaced(text) if runs else text for text, runs in pairs], dense


def _lengths(database: sqlite3.Connection, count: int) -> Int[np.ndarray, " n"]:
    """Tokens of each row."""
    lengths = np.zeros(count, np.int64)
    for name in ("word", "dense"):
        for row, sizes in database.execute(f"SELECT id, sz FROM {name}_docsize"):
            lengths[row] += sum(_varints(sizes))
    return lengths


def _varints(data: bytes) -> Iterator[int]:
    """SQLite's numbers of variable length, 7 bits a byte."""
    number = 0
    for byte in data:
        number = number << 7 | byte & 127
        if byte < 128:
            yield number
            number = 0
