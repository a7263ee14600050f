"""What a kill finds on the disk at any moment: every file and folder whole, the old or the new."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive.run.config_file import load_config, save_config
from contrastive.run.log import RunLog
from contrastive.train.config import TrainConfig
from data.files import replaced_folder

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from data.files import replaced_folder

folder, number = Path(sys.argv[1]), int(sys.argv[2])
seen = 0

def hook(event, _):
    global seen
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
with replaced_folder(folder) as part:
    for name in ("a", "b"):
        (part / name).write_text("new")
"""


def test_a_folder_is_whole_at_whatever_change_of_the_disk_its_writer_is_killed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    for number in range(1, 60):
        with replaced_folder(folder) as part:
            for name in ("a", "b"):
                (part / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED_AT, str(folder), str(number)])
        found = {file.name: file.read_text() for file in folder.iterdir()}
        assert found in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        if done.returncode == 0:
            break
    assert number > 8  # it was killed before each of these changes, and then not any more
    assert done.returncode == 0
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_replaced_where_two_cannot_change_places(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.files._exchange", lambda one, two: False)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    if fails:  # as a kill between the two renames leaves it
        folder.rename(tmp_path / "model.old")
        with pytest.raises(OSError, match="disk full"), replaced_folder(folder):
            raise OSError("disk full")
    else:
        with replaced_folder(folder) as part:
            (part / "a").write_text("new")
    assert (folder / "a").read_text() == ("old" if fails else "new")
    assert os.listdir(tmp_path) == ["model"]


def test_a_runs_files_are_never_rewritten_in_place(tmp_path: Path) -> None:
    """Another name of the old file keeps its contents, as a reader that has it open does."""
    cfg = TrainConfig(name="run", out=str(tmp_path))
    save_config(cfg, cfg.folder)
    metrics = cfg.folder / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    olds = {}
    for file in (cfg.folder / "config.json", metrics):
        olds[file] = (tmp_path / file.name, file.read_text())
        os.link(file, tmp_path / file.name)
    save_config(TrainConfig(name="run", out=str(tmp_path), log_every=3), cfg.folder, resumed=True)
    RunLog(cfg.folder, 1, 5, 1, {}).close()
    for link, text in olds.values():
        assert link.read_text() == text
    assert load_config(cfg.folder, TrainConfig).log_every == 3
    assert metrics.read_text() == '{"step": 1}\n'


def test_what_a_gpu_still_has_to_do_counts_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 3 s, of which a GPU has all but their launch to do when an evaluation begins; that
    is launched in 1 s and takes 100."""
    clock, left = [0.0], [3.0]

    def wait() -> None:
        clock[0] += left[0]
        left[0] = 0.0

    monkeypatch.setattr("contrastive.run.log.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("contrastive.distributed.synchronize", wait)
    log = RunLog(tmp_path, 0, 1, 1, {})
    assert log.step(1, torch.zeros(()), 30, {})
    with log.paused():
        clock[0] += 1
        left[0] = 100.0
    log.line(1)
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["pairs_per_s"] == 10
