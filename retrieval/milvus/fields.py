"""Columns of metadata as scalar fields of Milvus, and back.

Texts are kept twice: as they are, and as `contains` compares them (`searchable`). Dates and times
are whole numbers in their column's unit. A number that is not finite is kept as no value.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from data.errors import UsageError
from retrieval.index.filters import folded
from retrieval.milvus.client import MAX_TEXT_BYTES

FOLDED = "folded_"
# What a filter expression or this module means otherwise.
_RESERVED = {
    "vector", "in", "like", "and", "or", "not", "is", "null", "isnull", "true", "false", "exists",
    "meta", "iso", "interval", "count", "array_length", "array_contains", "text_match",
    "phrase_match", "random_sample", "to",
}  # fmt: skip


class Columns:
    """The columns of an index, each with its field."""

    def __init__(self, schema: pa.Schema) -> None:
        """Raises `UsageError` for a column that no field can hold."""
        self.schema = schema
        self.fields: dict[str, str] = {}  # by column; the id's is `id`
        self.scalars: dict[str, str] = {}  # field -> type in Milvus, the id's not among them
        for number, column in enumerate(schema):
            name, type_ = column.name, milvus_type(column)
            self.fields[name] = field = name if _is_plain(name) else f"Column_{number}"
            if name == "id":
                continue
            self.scalars[field] = type_
            if type_ == "VARCHAR":
                self.scalars[FOLDED + field] = type_

    def type_of(self, name: str) -> pa.DataType:
        """Of a column's values."""
        return value_type(self.schema.field(name).type)

    # ---- as a property of a collection -----------------------------------------------------

    def to_property(self) -> str:
        return base64.b64encode(self.schema.remove_metadata().serialize()).decode()

    @classmethod
    def from_property(cls, text: str) -> "Columns":
        """Raises ValueError for what is none."""
        return cls(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True))))

    # ---- rows ------------------------------------------------------------------------------

    def encode(self, table: pa.Table) -> list[dict[str, Any]]:
        """Rows as Milvus takes them, without vectors. Raises `UsageError` for a text that is too
        long."""
        values: dict[str, list[Any]] = {}
        for name, field in self.fields.items():
            column = table[name].combine_chunks()
            type_ = self.type_of(name)
            if types.is_dictionary(column.type):
                column = column.cast(type_)
            if types.is_temporal(type_):
                days = types.is_date32(type_)
                column = column.cast(pa.int32() if days else pa.int64()).cast(pa.int64())
            elif types.is_floating(type_):
                column = column.cast(pa.float64())
                column = pc.if_else(pc.is_finite(column), column, None)
            elif self.scalars.get(field) == "VARCHAR":
                twin = searchable(column.cast(pa.string()))
                for text in (column, twin):
                    if (pc.max(pc.binary_length(text)).as_py() or 0) > MAX_TEXT_BYTES:
                        raise UsageError(
                            f"column {name!r} holds a text of more than {MAX_TEXT_BYTES:,} bytes, "
                            "which Milvus does not take; shorten it and embed again"
                        )
                values[FOLDED + field] = twin.to_pylist()
            values[field] = column.to_pylist()
        names = [*values]
        return [dict(zip(names, row, strict=True)) for row in zip(*values.values(), strict=True)]

    def decode(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows as an index folder gives them."""
        values = {
            name: self.values_of(name, [row[field] for row in rows]).to_pylist()
            for name, field in self.fields.items()
        }
        names = [*values]
        return [dict(zip(names, row, strict=True)) for row in zip(*values.values(), strict=True)]

    def values_of(self, name: str, stored: Sequence[Any]) -> pa.Array:
        """What Milvus keeps of a column, in the column's own type."""
        type_ = self.type_of(name)
        if not types.is_temporal(type_):
            return pa.array(stored, type_)
        numbers = pa.array(stored, pa.int32() if types.is_date32(type_) else pa.int64())
        return numbers.cast(type_)

    def table(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pa.Table:
        """Some columns of rows."""
        return pa.table(
            {name: self.values_of(name, [row[self.fields[name]] for row in rows]) for name in names}
        )


def searchable(texts: pa.Array) -> pa.Array:
    """Folded texts in which nothing is a wildcard of LIKE, or escapes one: their full-width forms,
    which folding leaves nowhere, stand for these characters."""
    texts = folded(texts)
    for letter in "\\%_":
        texts = pc.replace_substring(texts, pattern=letter, replacement=chr(ord(letter) + 0xFEE0))
    return texts


def value_type(type_: pa.DataType) -> pa.DataType:
    """A dictionary's values', else the same."""
    return type_.value_type if types.is_dictionary(type_) else type_


def milvus_type(column: pa.Field) -> str:
    """VARCHAR, INT64, DOUBLE or BOOL. Raises `UsageError` for a column of another kind."""
    type_ = value_type(column.type)
    if types.is_string(type_) or types.is_large_string(type_):
        return "VARCHAR"
    if types.is_boolean(type_):
        return "BOOL"
    if types.is_integer(type_) or types.is_timestamp(type_) or types.is_date(type_):
        return "INT64"
    if types.is_floating(type_):
        return "DOUBLE"
    raise UsageError(
        f"column {column.name!r} holds {column.type}, which Milvus cannot filter by; embed without "
        "it, or keep the index in a folder"
    )


def _is_plain(name: str) -> bool:
    """Whether a column's name can be its field's, and mean nothing else in an expression."""
    known = name.startswith((FOLDED, "st_", "json_")) or name in _RESERVED
    return re.fullmatch(r"[a-z][a-z0-9_]{0,199}", name) is not None and not known
