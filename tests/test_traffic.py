"""What crosses between two ranks in a step: features once, O(B) scalars, parameters' gradients."""

import json
import os
import subprocess
import sys

import pytest
from launcher import ROOT

pytestmark = pytest.mark.slow
PAIRS, RANKS = 64, 2


@pytest.fixture(scope="module")
def result(tmp_path_factory, tiny_text) -> dict:
    """The benchmark's own result: both losses, in chunks and at ZeRO 0 to 3; open_clip's modes."""
    folder = tmp_path_factory.mktemp("traffic")
    command = [sys.executable, str(ROOT / "benchmarks" / "lit_traffic.py")]
    command += ["--text", tiny_text.removeprefix("hf:"), "--batch-sizes", str(PAIRS)]
    env = os.environ | {"BENCHMARK_RESULTS": str(folder)}
    subprocess.run(command, env=env, timeout=400)  # exits 1 where others use the loopback interface
    return json.loads((folder / "lit_traffic.json").read_text())


def test_features_cross_once_and_no_gradient_but_the_parameters(result):
    rows = result["figures"]["rows"]
    assert len([row for row in rows if row["who"] == "FlexiLiT"]) == 10
    targets = [target for target in result["targets"] if "loopback" not in target["what"]]
    assert len(targets) == 4
    for target in targets:
        assert target["met"], target


def test_gradients_of_features_are_seen_where_there_are_some(result):
    """By the same count: open_clip's sigmoid loss hands back what it got."""
    (row,) = [row for row in result["figures"]["rows"] if row["mode"] == "bidir"]
    sent = 4 * PAIRS / RANKS * row["width"]
    assert row["kinds"]["features"]["sent"] == sent
    assert row["kinds"]["feature gradients"]["sent"] == sent
