"""Bad samples: skipped and counted by kind, or raised with shard, key and cause."""

import pytest

from data.problems import BadSample, Problem, SampleError, attempt, skip_or_raise


def test_only_bad_samples_become_problems() -> None:
    def fail(error: Exception) -> int:
        raise error

    assert attempt("key", lambda: 3) == 3
    problem = attempt("key", lambda: fail(BadSample("no_image", "only txt")))
    assert problem == Problem("no_image", "key", "only txt")
    with pytest.raises(ZeroDivisionError):
        attempt("key", lambda: fail(ZeroDivisionError()))


def test_problems_are_counted_or_raised() -> None:
    counts = {"no_image": 1}
    problem = Problem("no_image", "key", "only txt")
    skip_or_raise(problem, "a.tar", "skip", counts)
    assert counts == {"no_image": 2}
    with pytest.raises(SampleError, match=r"^a\.tar: sample 'key': only txt \(no_image\)$"):
        skip_or_raise(problem, "a.tar", "raise", counts)
    with pytest.raises(SampleError, match=r"^a\.tar: the archive: cut \(truncated\)$"):
        skip_or_raise(Problem("truncated", "", "cut"), "a.tar", "raise", counts)
    with pytest.raises(SampleError, match=r"^b/c\.png: only txt \(no_image\)$"):
        skip_or_raise(Problem("no_image", "b/c.png", "only txt"), "", "raise", counts)
    assert counts == {"no_image": 2}
