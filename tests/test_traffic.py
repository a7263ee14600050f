"""What crosses between two ranks in a step: features once, O(B) scalars, parameters' gradients."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import lit_traffic
from lib.launcher import deepspeed
from lit_traffic import RANKS, Text, targets

pytestmark = pytest.mark.slow
PAIRS = 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_text) -> list[dict]:
    """Bytes of both losses, in chunks and at ZeRO 0 to 3, and of open_clip's modes."""
    folder = tmp_path_factory.mktemp("traffic")
    text = Text("tiny", tiny_text.removeprefix("hf:"), [PAIRS])
    (folder / "job.json").write_text(json.dumps([asdict(text)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        done = deepspeed(RANKS, Path(lit_traffic.__file__), str(folder / "job.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "rows.json").read_text())


def test_features_cross_once_and_no_gradient_but_the_parameters(rows):
    assert len([row for row in rows if row["who"] == "FlexiLiT"]) == 10
    for target in targets(rows):
        if "loopback" not in target.what:  # others may use that
            assert target.met, target


def test_gradients_of_features_are_seen_where_there_are_some(rows):
    """By the same count: open_clip's sigmoid loss hands back what it got."""
    (row,) = [row for row in rows if row["mode"] == "bidir"]
    sent = 4 * PAIRS / RANKS * row["width"]
    assert row["kinds"]["features"]["sent"] == sent
    assert row["kinds"]["feature gradients"]["sent"] == sent
