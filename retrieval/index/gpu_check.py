"""Which GPUs torch and FAISS can use here, and why not.

FAISS ends the process where a CUDA call fails (a driver too old, a GPU that it was not compiled
for). So torch is asked first, and FAISS tries once in a process of its own; what it could do is
remembered under `gpus` of the cache folder, per version, driver and GPU.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from data.errors import UsageError
from data.files import cache_folder, write_json
from data.progress import say_once
from retrieval.index.config import Device
from retrieval.index.faiss_setup import faiss

TRIAL_S = 120  # that FAISS may take to search a small index on each GPU; it takes 3 to 10
TRIAL = """
import numpy, faiss
vectors = numpy.random.default_rng(0).standard_normal((2000, 32)).astype("float32")
index = faiss.IndexIVFFlat(faiss.IndexFlatIP(32), 32, 8, faiss.METRIC_INNER_PRODUCT)
index.train(vectors)
index.add(vectors)
index.nprobe = 8
expected = index.search(vectors[:9], 1)[1]
for gpu in range(faiss.get_num_gpus()):
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(2**24)
    resources.setPinnedMemory(0)
    copy = faiss.index_cpu_to_gpu(resources, gpu, index)
    if (copy.search(vectors[:9], 1)[1] != expected).any():
        raise SystemExit("it finds other vectors than the CPU")
print("GPUs:", faiss.get_num_gpus())
"""

CAGRA_TRIAL = """
import faiss, numpy
from retrieval.index import gpus
vectors = numpy.random.default_rng(0).standard_normal((2000, 32)).astype("float32")
faiss.normalize_L2(vectors)
index = faiss.IndexHNSWFlat(32, 32, faiss.METRIC_INNER_PRODUCT)
index.init_level0 = False
index.add(vectors)
if problem := gpus.link_by_gpu(index):
    raise SystemExit(problem)
print("GPUs:", faiss.get_num_gpus())
"""


@dataclass(frozen=True)
class Gpus:
    """What this machine's GPUs can be used for."""

    count: int  # that torch works on
    faiss: bool  # FAISS works on all of them
    problem: str = ""  # why torch or FAISS works on fewer than there are, no sentence's end


@lru_cache(maxsize=1)
def find_gpus() -> Gpus:
    """Looked at once a process."""
    count, problem = try_torch()
    if not count:
        return Gpus(0, False, problem)
    problem = try_faiss(count)
    return Gpus(count, not problem, problem)


@lru_cache(maxsize=1)
def has_cagra() -> bool:
    """Whether FAISS makes graphs on a GPU; stderr is told where it has CAGRA and fails at it."""
    if not hasattr(faiss, "GpuIndexCagra") or not find_gpus().faiss:
        return False
    problem = try_faiss(find_gpus().count, CAGRA_TRIAL, what="cagra")
    if problem:
        say_once(f"graphs are made on the CPU: {problem}")
    return not problem


def num_gpus(device: Device) -> int:
    """GPUs to work on, 0 for the CPU; stderr is told once where there are some and none works.

    Raises `UsageError` for GPUs that are asked for and missing.
    """
    if device == "cpu":
        return 0
    gpus = find_gpus()
    if not gpus.count:
        if device != "auto":
            why = gpus.problem or "there is no GPU here"
            raise UsageError(f"device {device}: {why}; allowed: auto, cpu")
        if gpus.problem:
            say_once(f"no GPU is used: {gpus.problem}")
    return 1 if device == "cuda" else gpus.count


# ---- trials --------------------------------------------------------------------------------


def try_torch() -> tuple[int, str]:
    """How many GPUs torch works on, and why it does not work on those that there are."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # a driver too old is a warning, and no GPU
        available = torch.cuda.is_available()
    if not available:
        return 0, one_line(str(said[-1].message)) if said else ""
    count = torch.cuda.device_count()
    for gpu in range(count):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{gpu}")
            right = float((ones @ ones).sum()) == 64**3
        except RuntimeError as error:
            return 0, f"torch cannot use GPU {gpu} ({one_line(str(error))})"
        if not right:
            return 0, f"GPU {gpu} computes wrong sums"
    return count, ""


def try_faiss(
    count: int, program: str = TRIAL, timeout_s: float = TRIAL_S, what: str = "faiss"
) -> str:
    """Why FAISS cannot work on those GPUs; nothing where it can. what: names what is tried, where
    it is remembered."""
    if not hasattr(faiss, "StandardGpuResources"):
        return "the FAISS that is installed has no GPU code; faiss-gpu has"
    file = _known(what)
    with suppress(OSError, ValueError):
        if json.loads(file.read_text()) == {"format": 1, "gpus": count}:
            return ""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return f"FAISS does not answer on a GPU within {timeout_s:g} s"
    if done.returncode:
        return f"FAISS cannot use the GPU ({one_line(done.stderr or f'exit {done.returncode}')})"
    if done.stdout.split()[-1:] != [str(count)]:
        return f"FAISS sees other GPUs than torch ({one_line(done.stdout)} of {count})"
    with suppress(OSError):  # with a read-only home the next program tries again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": 1, "gpus": count})
    return ""


def one_line(text: str) -> str:
    """The last line that says something, at most 200 characters, no full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if "Error" in line or "rror:" in line), "")
    return (said or (lines[-1] if lines else "no reason given"))[:200].rstrip(".")


def _known(what: str) -> Path:
    """Where it is kept that a trial went well on what this process would use."""
    names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    driver = ""
    with suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    facts = json.dumps(
        [faiss.__version__, faiss.__file__, torch.__version__, driver, visible, names]
    )
    digest = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    return cache_folder("gpus") / f"{digest}{'' if what == 'faiss' else f'-{what}'}.json"
