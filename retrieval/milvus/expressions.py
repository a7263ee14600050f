"""Filters as expressions of Milvus. What a user gives becomes a literal of its column's type, or is
refused; nothing of it is ever an expression.

A row without a value (null) matches no comparison, and therefore its negation. Milvus might see
null in both, so each comparison is written with its negation, and `not` takes that one.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import types

from data.errors import UsageError
from retrieval.index.filters import Where, comparable, fold, matching
from retrieval.milvus.fields import FOLDED, Columns, searchable

ALL, NONE = "(id == 0 or id != 0)", "(id == 0 and id != 0)"
_PYTHON: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge,
}  # fmt: skip
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
MAX_INT = 2**63


class _Both(NamedTuple):
    """An expression and its negation."""

    yes: str
    no: str


def expression(where: Where | None, columns: Columns) -> str:
    """A filter as an expression, "" for none. Raises `UsageError` as `matching`, and for a
    function."""
    if where is None:
        return ""
    if callable(where):
        raise UsageError("where: a function cannot be sent to Milvus; give a filter as JSON")
    one_row = {c.name: pa.nulls(1, c.type) for c in columns.schema}
    matching(pa.table(one_row), where)  # says what cannot work
    compare = partial(_compare, columns)
    return fold(where, compare, _every, _some, lambda one: _Both(one.no, one.yes)).yes


def _every(parts: list[_Both]) -> _Both:
    if not parts:
        return _Both(ALL, NONE)
    return _Both(_join(" and ", [p.yes for p in parts]), _join(" or ", [p.no for p in parts]))


def _some(parts: list[_Both]) -> _Both:
    return _Both(_join(" or ", [p.yes for p in parts]), _join(" and ", [p.no for p in parts]))


def _join(word: str, parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({word.join(parts)})"


def _compare(columns: Columns, name: str, test: str, value: Any) -> _Both:
    """One comparison, which `matching` has let through."""
    field, type_ = columns.fields[name], columns.type_of(name)
    yes = _positive(field, type_, test, value)
    if name == "id":  # which every row has
        return _Both(yes, f"(not ({yes}))")
    no = f"({field} is null or (not ({yes})))"
    if test == "in" and None in value:
        return _Both(f"({field} is null or {yes})", f"({field} is not null and (not ({yes})))")
    return _Both(f"({field} is not null and {yes})", no)


def _positive(field: str, type_: pa.DataType, test: str, value: Any) -> str:
    """The comparison of rows that have a value."""
    if test == "contains":
        return _contains(field, value)
    if test == "in":
        given = [v for v in pa.array(value, type_) if v.is_valid]
        literals = [text for v in given if (text := _literal(v)) is not None]
        return f"{field} in [{', '.join(literals)}]" if literals else NONE
    scalar = comparable(value, type_)
    compare = _PYTHON[test]
    if types.is_boolean(type_):
        both = compare(False, scalar.as_py()), compare(True, scalar.as_py())
        if both[0] == both[1]:
            return ALL if both[0] else NONE
        return f"{field} == {str(both[1]).lower()}"
    number = scalar.as_py()
    if isinstance(number, float) and not math.isfinite(number):  # every stored one is
        return ALL if compare(0.0, number) else NONE
    if isinstance(number, float) and types.is_integer(type_):
        return _whole(field, test, number)
    return f"{field} {'==' if test == '=' else test} {_literal(scalar)}"


def _whole(field: str, test: str, number: float) -> str:
    """A column of whole numbers beside a number that need not be one."""
    if not -MAX_INT <= number < MAX_INT:
        return ALL if _PYTHON[test](0.0, number) else NONE
    if test in ("=", "!="):
        if number.is_integer():
            return f"{field} {'==' if test == '=' else '!='} {int(number)}"
        return NONE if test == "=" else ALL
    bound = math.floor(number) if test in (">", "<=") else math.ceil(number)
    return f"{field} {test} {bound}"


def _literal(scalar: pa.Scalar) -> str | None:
    """A value as Milvus reads it; None for one that no row can have."""
    type_ = scalar.type
    if types.is_temporal(type_):
        return str(scalar.value)
    value = scalar.as_py()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else None
    return str(int(value))


def quoted(text: str) -> str:
    """A text as a literal, between double quotes."""
    return '"' + "".join(_ESCAPES.get(letter, letter) for letter in text) + '"'


def _contains(field: str, value: str) -> str:
    (wanted,) = searchable(pa.array([value])).to_pylist()
    if not value:
        return ALL
    # accents alone fold to nothing, and are looked for as they are
    return f"{FOLDED + field if wanted else field} like {quoted(f'%{wanted or value}%')}"
