"""Progress: bars on a terminal, and nowhere else; lines in a log."""

import io
import re
import sys

import pytest
from launcher import ROOT

from data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counted(stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch, disable: bool = False) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    with Progress(range(3), "counting", unit="images", disable=disable) as bar:
        for number, count in enumerate(bar):
            assert count == number
            bar.set_postfix(skipped=3)
    return stderr.getvalue()


def test_bars_are_drawn_on_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\rcounting" in counted(Terminal(), monkeypatch)
    assert not counted(Terminal(), monkeypatch, disable=True)
    assert not counted(io.StringIO(), monkeypatch)  # a log hears of what lasts only


def test_a_log_gets_a_plain_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.progress.EVERY_S", 0)
    said = counted(io.StringIO(), monkeypatch).splitlines()
    assert any(line.startswith("counting: 1 of 3 images, ") for line in said)
    assert not counted(io.StringIO(), monkeypatch, disable=True)


def test_what_tqdm_draws_twice_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.progress.EVERY_S", 0)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress(total=3, desc="counting", unit="images") as bar:
        bar.update(2)
        said = sys.stderr.getvalue()  # type: ignore[attr-defined]
        bar.display(said.splitlines()[-1])  # as the monitor does
        assert sys.stderr.getvalue() == said != ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("top", ["data", "contrastive", "retrieval", "launch", "benchmarks"])
def test_one_place_decides_where_bars_are_drawn(top: str) -> None:
    for file in (ROOT / top).rglob("*.py"):
        if file != ROOT / "data/progress.py":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) tqdm", text, re.MULTILINE), file
            assert not re.search(r"print\(.*\\r", text), file
