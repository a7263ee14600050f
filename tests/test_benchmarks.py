"""What every benchmark relies on, seen from outside: a small one is run as a program, once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run
from launcher import ROOT

BENCHMARK = """
import json
from itertools import chain, repeat
from lib.harness import Target, Timings, finish, interleave
from lib.icons import names_of

timings = Timings({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [2.0, 2.0, 4.0, 4.0, 50.0]})
ratios = timings.ratio("a", "b"), timings.round_ratios("a", "b")
said = {"statistics": [timings.median("a"), timings.quartiles("a"), *ratios]}

calls, now, pace = "", 0.0, chain(repeat(1.0, 10), repeat(5.0))

def work(name, seconds):
    global calls, now
    calls += name
    now += seconds * next(pace)

fns = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 2.0)}
timings = interleave(fns, repeats=8, warmup=1, clock=lambda: now)
said["turns"] = [calls, timings.seconds, timings.round_ratios("b", "a")]
try:
    interleave(fns, repeats=0)
except ValueError as error:
    said["no rounds"] = str(error)

def status(name, *target, **kwargs):
    try:
        finish(name, {}, [Target("first", ">= 1", 1.0), Target(*target)], **kwargs)
    except SystemExit as stopped:
        return stopped.code
    except ValueError as error:
        return str(error)
    return 0

said["status"] = {
    "at a lower bound": status("a", "x", ">= 0.97", 0.97),
    "below it": status("b", "x", ">= 0.97", 0.969),
    "at an upper bound": status("c", "x", "<= 60", 60.0),
    "above it": status("d", "x", "<= 60", 61.0),
    "accepted": status("e", "x", "<= 60", 61.0, accepted={"x": "why"}),
    "another accepted": status("f", "x", "<= 60", 61.0, accepted={"y": "why"}),
    "no bound": status("g", "x", "about 1", 1.0),
}
keys = ["red-apples", "apple-juice", "juice-2-outline", "24", "a-b-c-d-e", "mug-of-tea", "c++"]
said["names"] = list(names_of(keys, ["Red Apple", "bowl of rice"]))
finish("h", {}, [], where="gpu")
with open("said.json", "w") as file:
    json.dump(said, file)

def plot(file):
    file.write_bytes(b"png")

finish("last", {"n": 1}, [Target("speed", ">= 3", 2.0)], plot, where="cpu")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the benchmark wrote: said.json and its results."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "small.py").write_text(BENCHMARK)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "BENCHMARK_RESULTS": "results"}
    command = [sys.executable, "small.py", "--option"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 1, done.stderr  # its last target is missed
    assert "speed: 2.000 (wanted >= 3, MISSED)" in done.stdout
    return folder


@pytest.fixture
def said(folder) -> dict[str, Any]:
    return json.loads((folder / "said.json").read_text())


def targets(folder: Path, name: str) -> list[dict[str, Any]]:
    (file,) = (folder / "results").glob(f"{name}.*json")  # .gpu.json where there is one
    return json.loads(file.read_text())["targets"]


def test_medians_quartiles_and_ratios_are_those_of_the_samples(said):
    # the ratio is that of medians, whatever one slow round did
    assert said["statistics"] == [3.0, [2.0, 4.0], 0.75, [0.5, 1.0, 0.75, 1.0, 2.0]]


def test_contenders_take_turns_and_a_slower_machine_does_not_move_the_ratio(said):
    """Warm-up is not timed; the machine is five times slower from the fifth timed round on."""
    calls, seconds, ratios = said["turns"]
    assert calls == "ba" + 4 * "abba"
    assert seconds["a"] == [1.0] * 4 + [5.0] * 4
    assert ratios == [2.0] * 8


def test_nothing_to_measure_is_an_error(said):
    assert said["no rounds"] == "repeats 0: at least 1"


def test_an_icon_that_shares_a_word_with_a_concept_held_out_is_no_training_pair(said):
    assert said["names"] == [["juice", "juice-2-outline"], ["mug of tea", "mug-of-tea"]]


def test_a_missed_target_fails_the_benchmark_unless_it_is_accepted(said, folder):
    assert said["status"] == {
        "at a lower bound": 0, "below it": 1, "at an upper bound": 0, "above it": 1,
        "accepted": 0, "another accepted": 1,
        "no bound": "target 'about 1': allowed are '>= NUMBER' and '<= NUMBER'",
    }  # fmt: skip
    missed = {"what": "x", "wanted": "<= 60", "got": 61.0, "met": False}
    assert targets(folder, "d")[1] == missed  # written all the same
    assert targets(folder, "e")[1] == missed | {"accepted": "why"}
    assert targets(folder, "f")[1] == missed


def test_result_file_has_the_documented_fields(folder):
    result = json.loads((folder / "results" / "last.json").read_text())
    assert list(result) == [
        "name", "command", "date", "revision", "machine", "versions", "figures", "targets",
    ]  # fmt: skip
    assert result["command"] == "python benchmarks/small.py --option"
    assert result["figures"] == {"n": 1}
    assert result["targets"] == [{"what": "speed", "wanted": ">= 3", "got": 2.0, "met": False}]
    assert (folder / "results" / "last.png").read_bytes() == b"png"
    assert (folder / "results" / "h.gpu.json").exists()


# ---- the parts of benchmarks/gpu.py, which no machine without a GPU measures ------------------


def gpu_benchmark(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "BENCHMARK_RESULTS": str(folder / "results")}
    program = ROOT / "benchmarks" / "gpu.py"
    return run(program, "--folder", folder / "data", *flags, env=env)


def test_parts_for_a_gpu_run_in_small_and_add_up_in_one_file(tmp_path):
    """A cached step with all its contenders, and an index: half a minute, most of it imports."""
    for part in ("tokens_7", "index"):
        done = gpu_benchmark(tmp_path, "--tiny", "--part", part)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "gpu.tiny.json").read_text())
    assert list(result["figures"]) == ["tokens_7", "index"]
    assert result["targets"] == []  # a GPU's alone
    assert min(result["figures"]["tokens_7"]["pairs_per_s"].values()) > 0
    assert result["figures"]["tokens_7"]["open_clip, from its own loader"]["pairs_per_s"] > 0
    assert result["figures"]["index"]["recall_at_10"] > 0.9
    listed = gpu_benchmark(tmp_path, "--tiny", "--list").stdout.splitlines()
    assert {line.split()[1] for line in listed if line.startswith("done")} == {"tokens_7", "index"}


CUT_SHORT = """
import gc, sys, weakref
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from transformers import AutoModel, AutoTokenizer
from lib.gpu.data import text_folder
from lib.gpu.memory import peak_gib
from lib.gpu.scale import TINY

data = Path(sys.argv[1])
folder = text_folder(TINY.minilm, TINY.vocabulary, data / "bert")
assert AutoModel.from_pretrained(folder).config.hidden_size == TINY.minilm.width
assert len(AutoTokenizer.from_pretrained(folder)) == TINY.vocabulary
assert [file.name for file in data.iterdir()] == ["bert"]

class Engine: pass
engine = Engine()
engine.itself, left = engine, weakref.ref(engine)
gc.disable()
del engine
assert left() is not None
peak_gib(anew=True)
assert left() is None
"""


BOUNDS = """
import sys
import torch
import torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
from lib.gpu import jpegs, memory

for rate in (1_000, 3_000, 20_000):
    for begin_s in (1.0, 15.0):
        pass_s = begin_s + 3 * 32_768 / rate
        repeats, rounds = jpegs.plan(begin_s, pass_s)
        assert repeats >= 1 and rounds >= 1
        spent = begin_s + pass_s + rounds * (begin_s + repeats * (pass_s - begin_s))
        assert spent <= jpegs.ROUNDS_S, (rate, begin_s, spent)
        assert rate < 20_000 or (repeats, rounds) == (jpegs.REPEATS, jpegs.ROUNDS)
assert jpegs.plan(0.2, 0.1)[0] >= 1

images, texts = F.normalize(torch.randn(2, 40, 16), dim=-1).to(memory.DEVICE)
logits, own = 10 * images @ texts.T, torch.arange(40, device=memory.DEVICE)
both = float(F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
for chunk in (7, 40):
    assert abs(memory._own_loss("softmax", images, texts, chunk) - both) < 0.02
"""


def test_a_part_for_a_gpu_is_bounded_and_its_softmax_is_clips(tmp_path):
    """However slow the tars are read; and texts in blocks give the loss of all at once."""
    done = run("-c", BOUNDS, ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr


def test_parts_for_a_gpu_begin_anew_where_one_was_cut_short(tmp_path):
    """Its weights are written again, and its memory is not counted."""
    half = tmp_path / "bert.part"
    half.mkdir()
    (half / "config.json").write_text("{")
    done = run("-c", CUT_SHORT, tmp_path, ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr
