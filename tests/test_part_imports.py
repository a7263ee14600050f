"""Importing a module without its package, as a program of its own does."""

import subprocess
import sys
from pathlib import Path

from launcher import ROOT

PACKAGE = {
    "__init__.py": "import sys\nfrom .small import SMALL\nfrom . import inner\nBIG = SMALL + 1\n"
    "sys.opened.append('big')\n",
    "small.py": "class Thing: pass\nSMALL = 1\n",
    "inner/__init__.py": "from .leaf import LEAF\nimport sys\nsys.opened.append('inner')\n",
    "inner/leaf.py": "import big.small\nLEAF = big.small.SMALL + 10\n",
}
PROGRAM = """
import sys
sys.opened = []
from contrastive.part_imports import import_alone
leaf = import_alone("big.inner.leaf")
assert leaf.LEAF == 11
assert sys.opened == []
import big, big.small
assert not hasattr(big, "__wrapped__")
thing = big.small.Thing
assert sys.opened == []
assert (big.BIG, sys.opened) == (2, ["big"])
assert big.small.Thing is thing
assert big.inner.leaf is leaf
from big import inner
assert inner.LEAF == 11
assert not hasattr(big, "nothing")
assert import_alone("big.small") is big.small
assert sys.opened == ["big", "inner"]
"""


def test_a_package_is_run_when_somebody_uses_it(tmp_path: Path) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / "big" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "big" / name).write_text(text)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
