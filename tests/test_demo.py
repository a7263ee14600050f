"""What README.md and docs say to type works, word for word, on what the demo leaves: here one of a
tiny model and few drawings, by the demo's own commands."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import tyro
from conftest import TINY_TOWER
from launcher import ROOT
from PIL import Image
from server_thread import serving

from contrastive import LitModel, load_vision_tower
from contrastive.cli import parse_run
from contrastive.recipes import DENSE_RECIPES, FLEXIFY_RECIPES, RECIPES
from retrieval import Searcher, index_regions
from retrieval.server.config import ServeConfig
from retrieval.server.startup import check_folders

RECIPES_OF = {
    "launch/lit.py": (RECIPES, "demo"),
    "launch/flexify.py": (FLEXIFY_RECIPES, "dinov2s"),
    "launch/dense.py": (DENSE_RECIPES, "scenes"),
}


def launch(program: str, *arguments: str) -> None:
    """`python launch/PROGRAM ARGUMENTS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        runpy.run_path(str(ROOT / program), run_name="__main__")


@pytest.fixture(scope="module")
def demo(
    tiny_model: LitModel, emoji_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder in which the commands are typed, with runs/ as the demo left it and a user's own
    photos; the current one."""
    here = tmp_path_factory.mktemp("checkout")
    model = LitModel(load_vision_tower(f"{TINY_TOWER}@224"), tiny_model.text).eval()

    def stage(command: list[str]) -> subprocess.CompletedProcess[str]:
        program, *arguments = command[1:]
        if arguments[0] == "data.emoji":
            shutil.copytree(emoji_shards, arguments[1])
        elif arguments[0] == "data.photographs":
            shutil.copytree(emoji_shards / "heldout_style", arguments[1])
        elif program == "launch/lit.py":
            model.save_pretrained(here / "runs/demo/model")
        elif program == "launch/zeroshot.py":
            (here / "runs/report").mkdir()
            (here / "runs/report/report.txt").write_text("")
        else:
            launch(program, *arguments)
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)  # which the demo leaves
        patch.setattr(subprocess, "run", stage)
        launch("launch/demo.py", "--out", str(here / "runs"))
    photos = here / "photos"
    photos.mkdir()
    shutil.copy(next(emoji_shards.glob("train/*.tar")), photos / "0000.tar")
    for number, file in enumerate((photos / "a.jpg", here / "holiday.jpg", here / "photo.jpg")):
        Image.new("RGB", (60, 40), (90 * number, 60, 20)).save(file)
    shutil.copytree(photos, here / "moved/photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        yield here


def blocks(page: str, language: str) -> list[str]:
    """The code of a page that is marked as this language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for marked, code in found if marked == language]


def commands(page: str) -> list[list[str]]:
    """What a page says to type, split as a shell does, without comments."""
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_demo_leaves_an_index_at_two_patch_sizes(demo: Path) -> None:
    assert sorted(Searcher.load(demo / "runs/index").patch_sizes) == [28, 56]
    assert (demo / "runs/hits.png").is_file()


def test_the_demo_shows_photographs_found_by_words_where_it_can_fetch_them(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(demo / "runs/photographs/hits.png") as found:
        assert found.height > 8 * 168  # a row for each query
    shutil.rmtree(demo / "runs/data/photographs")
    without_apt = 2
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda c: subprocess.CompletedProcess(c, without_apt * ("data.photographs" in c)),
    )
    monkeypatch.chdir(demo)  # which the demo leaves
    launch("launch/demo.py", "--out", str(demo / "runs"))
    assert f"found by words: {demo / 'runs'}/hits.png\n" in capsys.readouterr().out


def test_ctrl_c_waits_for_what_a_stage_still_saves(tmp_path: Path) -> None:
    stage = runpy.run_path(str(ROOT / "launch/demo.py"))["stage"]
    saves = (
        "import os, pathlib, signal, sys, time\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(1)\n"
        "pathlib.Path(sys.argv[1]).touch()"
    )
    command = ("python", "-c", saves, str(tmp_path / "saved"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "timings.json", "saving", tmp_path / "made", *command, optional=True)
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_what_a_page_says_to_type_works(page: str, demo: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    typed = commands(page)
    assert len(typed) >= 6
    for words in typed:
        program, *arguments = words
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        elif program == ".":
            assert arguments == [".venv/bin/activate"]
            assert "VENV   := .venv\n" in makefile
        elif program == "deepspeed":  # of shards that only a user has
            recipes, first = RECIPES_OF[arguments[0]]
            parse_run(arguments[1:], recipes, first, arguments[0], "")
        elif arguments[0] == "launch/photos.py":
            find_photos([with_a_model_at_hand(word) for word in arguments], demo)
        elif arguments[0] == "launch/serve.py":
            check_folders(tyro.cli(ServeConfig, args=arguments[1:]))
        else:
            assert program == "python"
            launch(*(with_a_model_at_hand(word) for word in arguments))


def find_photos(arguments: list[str], demo: Path) -> None:
    """Type it, wait until its page finds something, and end it with Ctrl-C."""
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:], "--port", "0"]
    env = {**os.environ, "FLEXILIT_CACHE": str(demo / "cache")}
    process = subprocess.Popen(
        [*command, "--no-browser"], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        page = re.search(r"http://\S+", process.stdout.readline())
        assert page is not None
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with urllib.request.urlopen(f"{page[0]}/v1/indices", timeout=120) as answer:
                if json.load(answer)["indices"][0]["count"]:
                    break
            time.sleep(0.1)
        else:
            pytest.fail("nothing was indexed in two minutes")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        if process.stdout is not None:
            process.stdout.close()


def with_a_model_at_hand(word: str) -> str:
    """The demo's model in place of published weights, which only a network has."""
    if not word.startswith("open_clip:"):
        return word
    name, _, weights = word.removeprefix("open_clip:").partition("@")
    assert weights.endswith(".safetensors") or (name, weights) in open_clip.list_pretrained()
    return "runs/demo/model"


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_what_a_page_says_in_python_works(page: str, demo: Path) -> None:
    (code,) = blocks(page, "python")
    exec(compile(code, page, "exec"), {})


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_the_requests_of_the_documentation_find_something(demo: Path) -> None:
    index_regions("runs/index")
    searcher = Searcher.load("runs/index")
    searcher.profile._ms = dict.fromkeys(searcher.model.patch_sizes, 1.0)  # max_ms, on any machine
    typed = [words for words in commands("docs/service.md") if words[0] == "curl"]
    typed = [words[: words.index("|")] if "|" in words else words for words in typed]
    assert len(typed) == 7
    with serving({"index": searcher}) as served:
        for words in typed:
            words[1] = words[1].replace(":1234", f":{served.port}")
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout)
            assert any(answer.get(found) for found in ("hits", "labels", "mask")), answer
