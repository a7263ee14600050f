"""Every program of examples/ runs as it stands, on small data."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import TINY_TOWER
from shard_maker import png

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("search.py", "index", "a cat")` is `python examples/search.py index "a cat"`; returns
    what it prints."""

    def run(program: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / program), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    files = [tmp_path / "photos" / name for name in ("a.png", "deep/b.png", "c.txt")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number, size=(64, 48)))
    return files[:2]


def test_every_example_is_run_here_and_shown_in_the_docs():
    here = Path(__file__).read_text()
    docs = (EXAMPLES.parent / "docs/examples.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f'run("{file.name}"' in here.replace("run(\n        ", "run(")
        assert f"examples/{file.name}" in docs


def test_search_at_two_patch_sizes(run, emoji_index):
    out = run("search_two_patch_sizes.py", emoji_index, "a happy cat", "two dogs")
    sizes = [line for line in out.splitlines() if line.startswith("patch size")]
    assert [line.split(":")[0] for line in sizes] == ["patch size 48", "patch size 40"]
    assert out.count("a happy cat") == 2
    assert out.count("[") == 2 * 2 * 5  # sizes, queries, hits


def test_classify_a_folder(run, model_dir, photos, tmp_path):
    out = run("classify_folder.py", model_dir, tmp_path / "photos", "cat", "dog")
    lines = [line.split("  ") for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(file) for file in photos]
    assert {line[1] for line in lines} <= {"cat", "dog"}


def test_features_at_every_patch_size(run, tiny_model, photos):
    rows = run("flexible_features.py", TINY_TOWER, *photos).splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == list(tiny_model.patch_sizes)
    assert rows[-1].split()[-1] == "1.000"  # the finest against itself


@pytest.mark.slow
def test_train_on_tars(run, emoji_shards, tiny_text, tmp_path):
    out = run(
        "train_on_tars.py", f"{emoji_shards}/train/*.tar", "--image-tower", TINY_TOWER,
        "--text-tower", tiny_text, "--steps", 3, "--batch", 8, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert "runs/mine/model reads images at patch sizes (48, " in out
    lines = (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()
    figures = {name for line in lines for name in json.loads(line)}
    assert {"loss", "logit_scale"} <= figures
