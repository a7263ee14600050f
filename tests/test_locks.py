"""One program at a time writes a folder, whichever ends first."""

import os
import subprocess
import sys

import pytest
from launcher import ROOT

from data.errors import UsageError
from data.locks import only_writer

HOLD = """
import pathlib, sys
from data.locks import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_and_a_killed_one_holds_nothing(tmp_path):
    folder = tmp_path / "new" / "index"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(UsageError, match=f"being written by process {other.pid} on"),
            only_writer(folder),
        ):
            pass
        other.kill()
    with only_writer(folder):
        assert not folder.exists()  # the lock lies beside it
    assert list(folder.parent.iterdir()) == []
