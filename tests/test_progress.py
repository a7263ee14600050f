"""Progress bars: on a terminal, and nowhere else."""

import io
import re

import pytest
from launcher import ROOT

from data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_terminals_alone() -> None:
    for file, disable, drawn in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        with Progress(range(3), "counting", file=file, disable=disable) as bar:
            assert list(bar) == [0, 1, 2]
            bar.set_postfix(images=3)
        assert ("counting" in file.getvalue()) == drawn
        assert drawn or not file.getvalue()


@pytest.mark.parametrize("top", ["data", "contrastive", "retrieval", "launch", "benchmarks"])
def test_one_place_decides_where_bars_are_drawn(top: str) -> None:
    for file in (ROOT / top).rglob("*.py"):
        if file != ROOT / "data/progress.py":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) tqdm", text, re.MULTILINE), file
            assert not re.search(r"print\(.*\\r", text), file
