"""Which columns of an index can tell images apart, and by which values."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from retrieval.index_interface import IndexState
from retrieval.server.api.answers import ColumnAnswer, ValueCount

# These say where an image's bytes lie, and whether they are still its own.
TECHNICAL = frozenset({"id", "shard", "offset", "size", "digest", "caption_modified"})
MODIFIED = "modified"  # of a photo, ns since 1970
DAY = r"^\d{4}-\d{2}-\d{2}(T|$)"  # of a date as ISO 8601 writes it
MAX_VALUES = 100  # a column with more is no choice
LOOKED_AT = 50_000  # rows that show what a column of texts holds


def describe_columns(snapshot: IndexState) -> list[ColumnAnswer]:
    """The columns worth a filter; those that hold one value in every image are not."""
    if snapshot.columns is None:
        return []
    found, num_rows = [], len(snapshot.column_values("key"))  # which no image lacks
    for field in snapshot.columns:
        if field.name not in TECHNICAL:
            values = snapshot.column_values(field.name, LOOKED_AT)
            if not _is_long_text(values):
                values = snapshot.column_values(field.name)
            described = describe(field.name, values, len(values) < num_rows)
            if described is not None:
                found.append(described)
    return found


def describe(name: str, values: pa.ChunkedArray, has_nulls: bool = False) -> ColumnAnswer | None:
    """A column by its values without nulls; None where they tell nothing apart."""
    type_ = str(values.type)
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if name == MODIFIED and types.is_int64(values.type):
        values = values.cast(pa.timestamp("ns"))
    if types.is_timestamp(values.type):  # of nanoseconds there are no datetimes
        values = values.cast(pa.timestamp("us", values.type.tz), safe=False)
    kind = values.type
    answer = ColumnAnswer(name=name, type=type_, kind="text", values=[], least=None, greatest=None)
    if types.is_date(kind) or types.is_timestamp(kind) or _holds_days(values):
        return _range(answer, "date", values)
    if _is_text(kind) or types.is_boolean(kind) or types.is_integer(kind):
        choices = _choices(values)
        if choices:
            tells = len(choices) > 1 or has_nulls
            return (
                answer.model_copy(update={"kind": "choice", "values": choices}) if tells else None
            )
    if _is_text(kind):
        return answer if len(values) else None
    if types.is_integer(kind) or types.is_floating(kind):
        return _range(answer, "number", values)
    return None


def _range(answer: ColumnAnswer, kind: str, values: pa.ChunkedArray) -> ColumnAnswer | None:
    ends: Any = pc.min_max(values)
    least, greatest = ends["min"].as_py(), ends["max"].as_py()
    if least is None or least == greatest:
        return None
    if hasattr(least, "isoformat"):
        least, greatest = least.isoformat(), greatest.isoformat()
    return answer.model_copy(update={"kind": kind, "least": least, "greatest": greatest})


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_long_text(values: pa.ChunkedArray) -> bool:
    """Whether the column surely is no choice and holds no days: the rest need not be read."""
    if not _is_text(values.type) or _holds_days(values):
        return False
    return bool(pc.count_distinct(values).as_py() > MAX_VALUES)


def _holds_days(values: pa.ChunkedArray) -> bool:
    """Whether all texts are dates, perhaps with a time."""
    if not _is_text(values.type) or not len(values):
        return False
    return bool(pc.all(pc.match_substring_regex(values, DAY)).as_py())


def _choices(values: pa.ChunkedArray) -> list[ValueCount]:
    """The values and how often they are there; none where they are too many for a choice."""
    if pc.count_distinct(values.slice(0, LOOKED_AT)).as_py() > MAX_VALUES:
        return []
    counts = pc.value_counts(values)
    if len(counts) > MAX_VALUES or 2 * len(counts) > len(values):
        return []
    pairs = [ValueCount(value=one["values"], count=one["counts"]) for one in counts.to_pylist()]
    return sorted(pairs, key=lambda pair: (-pair.count, str(pair.value)))
