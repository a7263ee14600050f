"""Which columns of an index can tell images apart, and by which values."""

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from retrieval.index.snapshot import Snapshot
from retrieval.server.api.answers import ColumnAnswer, ValueCount

# These say where an image's bytes lie, and whether they are still its own.
TECHNICAL = frozenset({"id", "shard", "offset", "size", "digest", "caption_modified"})
MAX_VALUES = 100  # a column with more is no choice
MODIFIED = "modified"  # of a photo, ns since 1970
LOOKED_AT = 50_000  # rows that show that a column has more


def describe_columns(snapshot: Snapshot) -> list[ColumnAnswer]:
    """The columns worth a filter; those that hold one value alone are not."""
    if snapshot.columns is None:
        return []
    names = [name for name in snapshot.columns.names if name not in TECHNICAL]
    tables = [segment.table.select(names) for segment in snapshot.segments]
    alive = [pa.array(segment.alive) for segment in snapshot.segments]
    found = []
    for field in snapshot.columns:
        if field.name in names:
            chunks = [
                table[field.name].filter(mask) for table, mask in zip(tables, alive, strict=True)
            ]
            values = pa.chunked_array([c for one in chunks for c in one.chunks], field.type)
            described = _describe(field.name, values.drop_null())
            if described is not None:
                found.append(described)
    return found


def _describe(name: str, values: pa.ChunkedArray) -> ColumnAnswer | None:
    kind, type_ = values.type, str(values.type)
    if name == MODIFIED and types.is_int64(kind):
        kind = pa.timestamp("ns")
        values = values.cast(kind)
    if types.is_dictionary(kind):
        values = values.cast(kind.value_type)
        kind = values.type
    is_text = types.is_string(kind) or types.is_large_string(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind)
    is_date = types.is_date(kind) or types.is_timestamp(kind)
    if is_text or types.is_boolean(kind) or types.is_integer(kind):
        choices = _choices(values)
        if len(choices) == 1 or not len(values):
            return None
        if choices:
            return ColumnAnswer(
                name=name, type=type_, kind="choice", values=choices, least=None, greatest=None
            )
    if is_text:
        return ColumnAnswer(
            name=name, type=type_, kind="text", values=[], least=None, greatest=None
        )
    if not (is_number or is_date):
        return None
    if types.is_timestamp(kind):  # of nanoseconds there are no datetimes
        values = values.cast(pa.timestamp("us", kind.tz), safe=False)
    ends = pc.min_max(values)
    least, greatest = ends["min"].as_py(), ends["max"].as_py()
    if least is None or least == greatest:
        return None
    if is_date:
        return ColumnAnswer(
            name=name, type=type_, kind="date", values=[],
            least=least.isoformat(), greatest=greatest.isoformat(),
        )  # fmt: skip
    return ColumnAnswer(
        name=name, type=type_, kind="number", values=[], least=least, greatest=greatest
    )


def _choices(values: pa.ChunkedArray) -> list[ValueCount]:
    """The values and how often they are there; none where they are too many for a choice."""
    if pc.count_distinct(values.slice(0, LOOKED_AT)).as_py() > MAX_VALUES:
        return []
    counts = pc.value_counts(values)
    if len(counts) > MAX_VALUES or 2 * len(counts) > len(values):
        return []
    pairs = [ValueCount(value=one["values"], count=one["counts"]) for one in counts.to_pylist()]
    return sorted(pairs, key=lambda pair: (-pair.count, str(pair.value)))
