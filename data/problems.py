"""Bad input has a kind, a place and a cause. It is skipped and counted, or it stops the run."""

from collections.abc import Mapping
from dataclasses import dataclass

from data.errors import DataError


class BadSample(Exception):  # noqa: N818
    """One sample cannot be used. `kind` is what is counted, `cause` what is told."""

    def __init__(self, kind: str, cause: str = "") -> None:
        super().__init__(f"{kind}: {cause}" if cause else kind)
        self.kind = kind
        self.cause = cause or kind.replace("_", " ")


@dataclass(frozen=True)
class Problem:
    """A bad sample as it was met. `key` is "" where the archive itself is at fault."""

    kind: str
    key: str
    cause: str


class SampleError(DataError):
    """Raised instead of skipping where `on_error="raise"`: names shard, key and cause."""

    @classmethod
    def at(cls, shard: str, problem: Problem) -> "SampleError":
        where = f"sample {problem.key!r}" if problem.key else "the archive"
        return cls(f"{shard}: {where}: {problem.cause} ({problem.kind})")


def add_counts(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add `more` to `total` in place, kind by kind."""
    for kind, count in more.items():
        total[kind] = total.get(kind, 0) + count
