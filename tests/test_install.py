"""What pip installs where, and that searching needs nothing of training."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launcher import ROOT
from packaging.requirements import Requirement

TRAINING = {"deepspeed", "tensorboard", "webdataset"}
PROGRAM = """
import sys
for name in ("deepspeed", "tensorboard", "webdataset"):
    sys.modules[name] = None  # an import of it fails, as where it is not installed
folder, shards = sys.argv[1:]
import retrieval.photos.indexing, retrieval.server.app
from retrieval import Searcher, evaluate
from retrieval.evaluation.datasets import load_dataset
from retrieval.server.config import ServeConfig
from retrieval.server.loading import load_service
searcher = Searcher.load(folder)
assert len(searcher.search(["a cat"], k=3)[0]) == 3
load_service(ServeConfig(index=(folder,)))
evaluate(searcher.model, load_dataset("shards", shards), (48,), num_workers=0)
"""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def on(project: dict[str, Any], sys_platform: str, machine: str) -> set[str]:
    """The names that a platform gets."""
    where = {"sys_platform": sys_platform, "platform_machine": machine}
    wanted = map(Requirement, project["project"]["dependencies"])
    return {r.name for r in wanted if r.marker is None or r.marker.evaluate(where)}


def test_every_platform_gets_a_faiss_that_it_has_wheels_of(project: dict[str, Any]) -> None:
    assert {"faiss-gpu", "deepspeed"} <= on(project, "linux", "x86_64")
    for where in (("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")):
        assert "faiss-cpu" in on(project, *where)
        assert "faiss-gpu" not in on(project, *where)
    assert "faiss-cpu" not in on(project, "linux", "x86_64")
    assert "deepspeed" not in on(project, "darwin", "arm64")


def test_the_group_without_training_is_the_dependencies_without_it(project: dict[str, Any]) -> None:
    dependencies = project["project"]["dependencies"]
    kept = [line for line in dependencies if Requirement(line).name not in TRAINING]
    assert project["dependency-groups"]["serve"] == kept
    assert len(kept) == len(dependencies) - len(TRAINING)


def test_searching_serving_and_evaluating_need_nothing_of_training(
    emoji_index: Path, emoji_shards: Path
) -> None:
    where = [str(emoji_index), str(emoji_shards / "heldout_style")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *where], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_program_is_in_the_wheel_and_has_a_name(project: dict[str, Any]) -> None:
    setuptools = pytest.importorskip("setuptools")
    wanted = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert "launch" in setuptools.find_namespace_packages(str(ROOT), include=wanted)
    assert project["project"]["scripts"] == {"flexilit": "launch.flexilit:main"}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "launch.flexilit", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    said = run().stdout
    names = {file.stem for file in (ROOT / "launch").glob("*.py")} - {"flexilit"}
    assert names == {line.split()[0] for line in said.splitlines() if line.startswith("  ")}
    assert "index, lit, photos" in run("nothing").stderr
    refused = run("photos", "/nothing/here")
    assert (refused.returncode, refused.stderr) == (
        2, "error: /nothing/here is no folder of photos\n",
    )  # fmt: skip
