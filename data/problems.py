"""Bad input: what it is called, where it was met, and whether it is skipped or stops the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from data.errors import DataError

T = TypeVar("T")


class BadSample(Exception):  # noqa: N818
    """One sample cannot be used. `kind` keys the error counts; `cause` goes in the message."""

    def __init__(self, kind: str, cause: str = "") -> None:
        super().__init__(f"{kind}: {cause}" if cause else kind)
        self.kind = kind
        self.cause = cause or kind.replace("_", " ")


@dataclass(frozen=True)
class Problem:
    """A bad sample and its key, which is "" where the archive itself is at fault."""

    kind: str
    key: str
    cause: str


class SampleError(DataError):
    """Raised instead of skipping where `on_error` is "raise": names shard, key and cause."""

    @classmethod
    def at(cls, shard: str, problem: Problem) -> "SampleError":
        """`shard`: "" for an image that lies in none; its key is then its path."""
        why = f"{problem.cause} ({problem.kind})"
        if not shard:
            return cls(f"{problem.key}: {why}")
        where = f"sample {problem.key!r}" if problem.key else "the archive"
        return cls(f"{shard}: {where}: {why}")


def attempt(key: str, make: Callable[[], T]) -> T | Problem:
    """What `make` returns for the sample `key`, or the problem where it raises `BadSample`."""
    try:
        return make()
    except BadSample as bad:
        return Problem(bad.kind, key, bad.cause)


def skip_or_raise(
    problem: Problem, shard: str, on_error: Literal["skip", "raise"], counts: dict[str, int]
) -> None:
    """Add the problem to `counts`, by kind, or raise it as a `SampleError`."""
    if on_error == "raise":
        raise SampleError.at(shard, problem)
    add_counts(counts, {problem.kind: 1})


def add_counts(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add `more` to `total` in place, kind by kind."""
    for kind, count in more.items():
        total[kind] = total.get(kind, 0) + count
