"""What a user reads of an error: one line, with the names that the user typed."""

import errno
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch
from launcher import ROOT
from torch.utils.data import DataLoader, Dataset

from data.errors import Stopped, UsageError, exit_on_usage_error, parameters, with_flags
from data.pipeline.workers import begin_worker


@dataclass(frozen=True)
class Loader:
    views: int = 1
    num_workers: int = 2


@dataclass(frozen=True)
class Args:
    steps: int = 1
    out: str = ""
    patch_sizes: tuple[int, ...] = ()
    data: Loader = field(default_factory=Loader)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("data.views 0: at least 1", "--data.views 0: at least 1"),
        ("data.num_workers -1: at least 0", "--data.num-workers -1: at least 0"),
        ("steps 0: at least 1", "--steps 0: at least 1"),
        ("out x exists", "--out x exists"),
        ("7 steps are too many; at most steps=3", "7 steps are too many; at most --steps 3"),
        ("name patch_sizes, or leave it out.", "name --patch-sizes, or leave it out."),
        ("(data.views, data.num_workers)", "(--data.views, --data.num-workers)"),
        ("/tmp/data.views/patch_sizes is no folder", "/tmp/data.views/patch_sizes is no folder"),
        ("data.viewsets and my_patch_sizes", "data.viewsets and my_patch_sizes"),
        ("patch_sizes.json and the steps", "patch_sizes.json and the steps"),
        ("--data.views 0", "--data.views 0"),
    ],
)
def test_parameters_become_flags_where_they_are_meant(message, said):
    assert with_flags(message, parameters(Args)) == said


def test_a_usage_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_usage_error(Args, "resume"):
        raise UsageError("data.views 0: at least 1; or resume=runs/x")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --data.views 0: at least 1; or --resume runs/x\n"


def test_an_argument_that_is_not_utf8_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search.py", os.fsdecode(b"caf\xe9")])
    with pytest.raises(SystemExit) as stopped, exit_on_usage_error(Args):
        pytest.fail("the program has begun")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: 'caf\\udce9' is not UTF-8")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            Stopped("saved; go on with resume=runs/x", 15),
            143,
            "saved; go on with --resume runs/x\n",
        ),
    ],
)
def test_an_interrupt_is_one_line_of_rank_0(error, status, said, capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped, exit_on_usage_error(Args, "resume"):
            raise error
        assert stopped.value.code == status
        assert capsys.readouterr().err == (said if rank == "0" else "")


WRITES = {
    "python": "import pathlib; pathlib.Path(file).write_bytes(bytes(5000))",
    "numpy": "import numpy; numpy.save(file, numpy.zeros(9999))",
    "arrow": "import pyarrow as pa, pyarrow.parquet as pq\n"
    "    pq.write_table(pa.table({'a': list(range(9999))}), file)",
    "folder": "import shutil; shutil.copytree(file.rpartition('/')[0], file)",
}
"""Statements that write more than 4,000 bytes to `file`."""


@pytest.mark.parametrize("by", WRITES)
def test_a_disk_that_takes_no_more_is_one_line(by, tmp_path):
    """A limit on the size of files stands for a full disk: the same errors, other numbers."""
    program = (
        "import resource, signal, sys\n"
        "from data.errors import exit_on_usage_error\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        f"file = {str(tmp_path / 'x')!r}\n"
        f"with exit_on_usage_error():\n    {WRITES[by]}\n"
    )
    (tmp_path / "large").write_bytes(bytes(5000))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "cannot be written or read (" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_keep_their_traceback():
    with pytest.raises(FileNotFoundError), exit_on_usage_error():
        raise FileNotFoundError(2, "No such file or directory", "x")


@pytest.mark.parametrize(
    ("error", "file"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "'/a/b'"),
        (PermissionError(errno.EACCES, "Permission denied", "a/out"), "'a/out'"),
        (OSError("100 requested and 20 written"), "a file"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, file, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_usage_error(Args):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {file} cannot be written or read (")


def test_a_gpu_without_room_is_one_line(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    with pytest.raises(SystemExit) as stop, exit_on_usage_error(Args):
        raise error
    assert stop.value.code == 2
    said = "error: the GPU is out of memory (Tried to allocate 2.00 GiB); smaller batches"
    assert capsys.readouterr().err.startswith(said)


def test_what_cuda_says_of_a_full_gpu_is_one_line_too(capsys):
    """While a process takes its place on a GPU that others fill, torch has no error of its own."""
    with pytest.raises(SystemExit), exit_on_usage_error(Args):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the GPU is out of memory (no more was given); smaller batches")


class Unsendable(Dataset):
    """Stands in for pixels for which there is no shared memory."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> object:
        return threading.Lock() if number == 2 else number


def test_what_a_loader_cannot_hand_over_is_one_line_and_nobody_waits(capfd):
    """torch's loader would wait without end, for which the timeout stands here."""
    loader = DataLoader(
        Unsendable(), batch_size=None, num_workers=1, worker_init_fn=begin_worker, timeout=100
    )
    with pytest.raises(SystemExit) as stop, exit_on_usage_error(Args):
        list(loader)
    assert stop.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("a loader process: cannot pickle")
    assert said[-1].startswith("error: a loader process has ended, as where a container has little")
