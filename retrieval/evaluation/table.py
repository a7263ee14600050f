"""Tables for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    group: str
    head: str
    cells: list[str]


def fixed_width(columns: Sequence[Column]) -> str:
    """Right-aligned columns under their heads; a line of group names over columns that have one."""
    widths = [max(len(c.head), *map(len, c.cells)) for c in columns]
    spans: list[tuple[str, list[int]]] = []
    for number, column in enumerate(columns):
        if spans and spans[-1][0] == column.group:
            spans[-1][1].append(number)
        else:
            spans.append((column.group, [number]))
    for name, members in spans:  # a long group name widens its columns
        missing = len(name) - sum(widths[m] for m in members) - 2 * (len(members) - 1)
        for extra in range(missing):
            widths[members[extra % len(members)]] += 1
    lines = []
    if any(name for name, _ in spans):
        total = [sum(widths[m] for m in members) + 2 * (len(members) - 1) for _, members in spans]
        names = zip(spans, total, strict=True)
        lines.append("    ".join(name.center(width) for (name, _), width in names))
    rows = [[c.head for c in columns], *zip(*(c.cells for c in columns), strict=True)]
    for row in rows:
        parts = ["  ".join(row[m].rjust(widths[m]) for m in members) for _, members in spans]
        lines.append("    ".join(parts))
    rule = "-" * max(map(len, lines))
    heads = len(lines) - len(rows) + 1
    return "\n".join(line.rstrip() for line in [*lines[:heads], rule, *lines[heads:]])
