"""Filters on metadata columns, as JSON that a request can carry.

    {"size": {">": 1000}, "caption": {"contains": "cat"}}       both
    {"shard": "photos/0001.tar"}                                equal
    {"any": [{"key": {"in": ["a", "b"]}}, {"not": {"caption": {"=": ""}}}]}

    {"taken": {">=": "2024-05-01", "<": "2024-06-01"}}          dates and times as texts

`any` and `all` hold a list of filters, `not` one. `contains` compares what a reader takes for the
same (see `folded`), `=` and `in` compare texts as they are stored. A row without a value (null)
matches no comparison.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, UInt8

from data.errors import UsageError
from retrieval.words.folding import folded, folded_text

Where = Mapping[str, Any] | Callable[[np.ndarray], np.ndarray]
"""A filter as JSON, or a function from ids (n,) int64 to the ones wanted, (n,) bool."""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
MAX_DEPTH = 16  # filters within filters


@dataclass(frozen=True)
class NamedFilter:
    """A function from ids to the ones wanted, of which an index remembers the rows by its name:
    equal names let through equal ids. No filter in JSON may be written like a name."""

    name: str
    wanted: Callable[[np.ndarray], np.ndarray]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return self.wanted(ids)


@dataclass(frozen=True, eq=False)  # one is itself alone, and may be a key
class Selection:
    """The rows of one segment that a search may find."""

    mask: Bool[np.ndarray, " n"]
    packed: UInt8[np.ndarray, " bytes"]  # the same, a bit each
    count: int

    @classmethod
    def of(cls, mask: Bool[np.ndarray, " n"]) -> "Selection":
        return cls(mask, pack(mask), int(mask.sum()))


def pack(mask: Bool[np.ndarray, " n"]) -> UInt8[np.ndarray, " bytes"]:
    """A bit per vector, little end first, as FAISS reads bitmaps."""
    return np.packbits(mask, bitorder="little")


def parse_where(text: str) -> dict[str, Any]:
    """A filter from JSON text. Raises `UsageError` for anything else."""
    try:
        where = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"where {text[:80]!r} is not JSON: {str(error)[:80]}") from error
    if not isinstance(where, dict):
        raise UsageError(f"where {text[:80]!r} is no JSON object such as {EXAMPLE}")
    return where


EXAMPLE = '{"caption": {"contains": "cat"}}'


def written(where: Mapping[str, Any] | None) -> str:
    """A filter as JSON, equal for equal filters. Raises `UsageError` where it has none."""
    try:
        return json.dumps(where, sort_keys=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"where cannot be written as JSON: {str(error)[:80]}") from error


def matching(table: pa.Table, where: Where) -> Bool[np.ndarray, " n"]:
    """Which rows of `table` a filter lets through. Raises `UsageError` for a column that is not
    there, an operator that does not exist, or a value that the column cannot be compared with."""
    if callable(where):
        wanted = np.asarray(where(table["id"].to_numpy()))
        if wanted.shape != (len(table),) or wanted.dtype != np.bool_:
            raise UsageError(
                f"the filter gave {wanted.dtype} of shape {wanted.shape}, allowed is bool of shape "
                f"({len(table)},)"
            )
        return wanted
    return fold(
        where,
        partial(_compare, table),
        lambda parts: reduce(np.logical_and, parts, np.ones(len(table), bool)),
        lambda parts: reduce(np.logical_or, parts),
        np.logical_not,
    )


T = TypeVar("T")


def fold(
    where: Any,
    compare: Callable[[str, str, Any], T],
    every: Callable[[list[T]], T],
    some: Callable[[list[T]], T],
    invert: Callable[[T], T],
    depth: int = MAX_DEPTH,
) -> T:
    """What a filter means: its comparisons (column, operator, value), joined. every: of perhaps no
    part. Raises `UsageError` for what is no filter."""
    if depth == 0:
        raise UsageError(f"where has more than {MAX_DEPTH} filters within filters")
    if not isinstance(where, Mapping):
        raise UsageError(f"where: {_short(where)} is no object such as {EXAMPLE}")
    parts: list[T] = []
    for name, wanted in where.items():
        if name in ("any", "all"):
            if not isinstance(wanted, list) or not wanted:
                raise UsageError(f"where: {name} takes a list of filters, not {_short(wanted)}")
            join = some if name == "any" else every
            parts.append(join([fold(w, compare, every, some, invert, depth - 1) for w in wanted]))
        elif name == "not":
            parts.append(invert(fold(wanted, compare, every, some, invert, depth - 1)))
        else:
            tests = wanted if isinstance(wanted, Mapping) else {"=": wanted}
            parts += [compare(name, test, value) for test, value in tests.items()]
    return every(parts)


def _compare(table: pa.Table, name: str, test: str, value: Any) -> Bool[np.ndarray, " n"]:
    if name not in table.column_names:
        allowed = ", ".join(table.column_names)
        raise UsageError(f"where: no column {name!r:.80}; allowed: {allowed}, any, all, not")
    column = table[name]
    try:
        if test == "contains":
            if not isinstance(value, str):
                raise UsageError(f"where: contains takes a text, not {_short(value)}")
            result = _contains(column, value)
        elif test == "in":
            if not isinstance(value, list):
                raise UsageError(f"where: in takes a list, not {_short(value)}")
            result = pc.is_in(column, pa.array(value, column.type))
        elif test in COMPARISONS:
            if value is None or isinstance(value, (list, Mapping)):
                raise UsageError(f"where: {test} takes a text or a number, not {_short(value)}")
            result = COMPARISONS[test](column, comparable(value, column.type))
        else:
            allowed = ", ".join([*COMPARISONS, "in", "contains"])
            raise UsageError(f"where: no operator {test!r:.80}; allowed: {allowed}")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"where: column {name} holds {column.type}, which {test} {_short(value)} does not fit"
        ) from error
    return pc.fill_null(result, False).to_numpy().astype(bool)


def _contains(column: pa.ChunkedArray, value: str) -> pa.ChunkedArray:
    wanted = folded_text(value)
    if not wanted:  # accents alone
        return pc.match_substring(column, value)
    chunks = []
    for chunk in column.chunks:
        plain = pc.fill_null(pc.string_is_ascii(chunk), True)  # most are, and fold at once
        texts = pc.ascii_lower(chunk)
        if not pc.all(plain).as_py():
            others = folded(chunk.filter(pc.invert(plain)))
            texts = pc.replace_with_mask(texts, pc.invert(plain), others)
        chunks.append(pc.match_substring(texts, wanted))
    return pa.chunked_array(chunks, pa.bool_())


def comparable(value: Any, type_: pa.DataType) -> pa.Scalar:
    """A value as a column's values are compared with it. A number stays what it is (a
    column of whole numbers may be compared with 0.5)."""
    if isinstance(value, float) and pa.types.is_integer(type_):
        return pa.scalar(value)
    if isinstance(value, str) and pa.types.is_temporal(type_):
        zone = getattr(type_, "tz", None)
        naive = pa.scalar(value).cast(pa.timestamp(type_.unit) if zone else type_)
        return pc.assume_timezone(naive, zone) if zone else naive
    return pa.scalar(value, type_)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
