"""What crosses between two ranks in a step: features once, O(B) scalars, parameters' gradients."""

import json

import pytest
from forked import ranks, run
from launcher import ROOT

pytestmark = pytest.mark.slow
PAIRS, RANKS = 64, 2
BENCHMARK = ROOT / "benchmarks" / "lit_traffic.py"


# The benchmark's own bounds, of what its ranks have written.
TARGETS = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from lit_traffic import targets
with open(sys.argv[2]) as file:
    print(json.dumps([{**vars(target), "met": target.met} for target in targets(json.load(file))]))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory, tiny_text) -> dict:
    """What the benchmark counts: both losses, in chunks and at ZeRO 0 to 3; open_clip's modes."""
    job = tmp_path_factory.mktemp("traffic") / "job.json"
    text = {"name": "tiny", "folder": tiny_text.removeprefix("hf:"), "batch_sizes": [PAIRS]}
    job.write_text(json.dumps([text]))
    counted = ranks(RANKS, BENCHMARK, str(job))
    assert counted.returncode == 0, counted.stderr[-3000:]
    rows = job.with_name("rows.json")
    bounds = run("-c", TARGETS, BENCHMARK.parent, rows)
    assert bounds.returncode == 0, bounds.stderr
    return {"rows": json.loads(rows.read_text()), "targets": json.loads(bounds.stdout)}


def test_features_cross_once_and_no_gradient_but_the_parameters(result):
    rows = result["rows"]
    assert len([row for row in rows if row["who"] == "FlexiLiT"]) == 10
    targets = [target for target in result["targets"] if "loopback" not in target["what"]]
    assert len(targets) == 4
    for target in targets:
        assert target["met"], target


def test_gradients_of_features_are_seen_where_there_are_some(result):
    """By the same count: open_clip's sigmoid loss hands back what it got."""
    (row,) = [row for row in result["rows"] if row["mode"] == "bidir"]
    sent = 4 * PAIRS / RANKS * row["width"]
    assert row["kinds"]["features"]["sent"] == sent
    assert row["kinds"]["feature gradients"]["sent"] == sent
