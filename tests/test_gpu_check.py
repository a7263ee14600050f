"""A GPU that torch or FAISS cannot use is told in one sentence, and the CPU does the work."""

import warnings

import numpy as np
import pytest
import torch
from forked import run

from data.errors import UsageError
from retrieval.index import gpu_check
from retrieval.index.create import new_index
from retrieval.index.gpu_check import Gpus, num_gpus, try_faiss, try_torch
from retrieval.index.gpus import to_gpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path))
    gpu_check.say_once.cache_clear()


def with_gpus(monkeypatch: pytest.MonkeyPatch, gpus: Gpus) -> None:
    monkeypatch.setattr(gpu_check, "find_gpus", lambda: gpus)
    monkeypatch.setattr("retrieval.index.gpus.find_gpus", lambda: gpus)


def test_a_driver_too_old_is_a_sentence_or_the_cpu_with_a_line(monkeypatch, capsys) -> None:
    def too_old() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old (11040).", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    count, problem = try_torch()
    assert count == 0
    with_gpus(monkeypatch, Gpus(count, False, problem))
    with pytest.raises(UsageError, match=r"device cuda: .*driver is too old .*allowed: auto, cpu"):
        num_gpus("cuda")
    assert num_gpus("auto") == num_gpus("auto") == num_gpus("cpu") == 0
    assert capsys.readouterr().err.count("no GPU is used: CUDA initialization") == 1


def test_a_gpu_that_torch_was_not_compiled_for_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def fails(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with")

    monkeypatch.setattr(torch, "ones", fails)
    count, problem = try_torch()
    assert count == 0
    assert problem.startswith("torch cannot use GPU 0 (CUDA error: no kernel image")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "cannot use the GPU"),
        ("raise SystemExit('it finds other vectors than the CPU')", "it finds other vectors"),
        ("import time; time.sleep(60)", "does not answer on a GPU within 1 s"),
        ("print('GPUs:', 0)", "sees other GPUs than torch"),
    ],
)
def test_a_faiss_that_fails_on_a_gpu_ends_its_own_process_alone(program, words) -> None:
    problem = try_faiss(1, program, timeout_s=1.0 if "sleep" in program else 60.0)
    assert words in problem
    assert "\n" not in problem


def test_a_trial_that_went_well_is_not_made_again() -> None:
    assert try_faiss(1, "print('GPUs:', 1)") == ""
    assert try_faiss(1, "raise SystemExit(1)") == ""
    assert try_faiss(2, "raise SystemExit(1)") != ""


def test_the_trial_itself_runs() -> None:
    done = run("-c", gpu_check.TRIAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GPUs: ")


def test_lists_stay_on_the_cpu_where_faiss_cannot_use_the_gpu(monkeypatch, capsys) -> None:
    with_gpus(monkeypatch, Gpus(1, False, "FAISS cannot use the GPU (why)"))
    monkeypatch.setattr("retrieval.index.gpus.gpu_memory", lambda: 2**30)
    index = new_index("ivf", 8, 100, np.eye(100, 8, dtype=np.float32)).index
    assert to_gpus(index, "ivf", "auto", 1000) is None
    said = capsys.readouterr().err
    assert "the ivf index is searched on the CPU: FAISS cannot use the GPU (why)" in said
    with pytest.raises(UsageError, match=r"^device cuda: FAISS cannot use the GPU \(why\)"):
        to_gpus(index, "ivf", "cuda", 1000)
