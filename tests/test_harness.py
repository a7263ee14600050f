"""The benchmarks' arithmetic and result file."""

import json
from itertools import chain, count, repeat
from pathlib import Path

import pytest

from lib.harness import Target, Timings, interleave, write_result


def test_medians_quartiles_and_ratios_are_those_of_the_samples() -> None:
    timings = Timings({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [2.0, 2.0, 4.0, 4.0, 50.0]})
    assert timings.median("a") == 3.0
    assert timings.quartiles("a") == (2.0, 4.0)
    assert timings.ratio("a", "b") == 0.75  # of medians, whatever one slow round did
    assert timings.round_ratios("a", "b") == [0.5, 1.0, 0.75, 1.0, 2.0]


def test_contenders_take_turns_and_warmup_is_not_timed() -> None:
    calls: list[str] = []
    clock = count().__next__  # each reading is one second later
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=3,
        warmup=1,
        clock=lambda: float(clock()),
    )
    assert len(calls) == 2 * (3 + 1)
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))
    assert calls[2:4] == ["a", "b"]
    assert calls[4:6] == ["b", "a"]
    assert timings.seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_machine_that_slows_down_does_not_move_the_ratio() -> None:
    now, pace = 0.0, chain(repeat(1.0, 8), repeat(5.0))  # five times slower from the fifth round on

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds * next(pace)

    fns = {"a": lambda: work(1.0), "b": lambda: work(2.0)}
    timings = interleave(fns, repeats=9, warmup=0, clock=lambda: now)
    assert timings.ratio("b", "a") == 2.0
    assert timings.round_ratios("b", "a") == [2.0] * 9


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats 0"):
        interleave({"a": lambda: None}, repeats=0)


@pytest.mark.parametrize(
    ("wanted", "got", "met"),
    [
        (">= 0.97", 0.97, True),
        (">= 0.97", 0.969, False),
        ("<= 60", 60.0, True),
        ("<= 60", 61.0, False),
    ],
)
def test_target_is_met_at_its_bound(wanted: str, got: float, met: bool) -> None:
    assert Target("x", wanted, got).met is met


def test_a_target_without_a_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="'about 1'"):
        _ = Target("x", "about 1", 1.0).met


def test_result_file_has_the_documented_fields(tmp_path: Path) -> None:
    def plot(file: Path) -> None:
        file.write_bytes(b"png")

    targets = [Target("speed", ">= 1", 2.0)]
    file = write_result("x", {"n": 1}, targets, plot, where="cpu", results=tmp_path)
    result = json.loads(file.read_text())
    assert file.name == "x.json"
    assert list(result) == [
        "name", "command", "date", "revision", "machine", "versions", "figures", "targets",
    ]  # fmt: skip
    assert result["figures"] == {"n": 1}
    assert result["targets"] == [{"what": "speed", "wanted": ">= 1", "got": 2.0, "met": True}]
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "x.png"}
    assert write_result("x", {}, [], where="gpu", results=tmp_path).name == "x.gpu.json"
