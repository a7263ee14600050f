"""What one image costs a model at each patch size, and the finest within a budget.

Times are measured once per machine, one image at a time, and kept under `profiles` of the cache
folder.
"""

import hashlib
import json
import math
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.files import cache_folder
from retrieval.json_files import write_json
from retrieval.search.config import Budget, PatchSizeOrBudget

ROUNDS = 10


class CostProfile:
    """What one image costs a model on this machine, per patch size. Safe for threads."""

    def __init__(self, model: LitModel, folder: Path | None = None) -> None:
        """folder: where measurements are kept; the user's cache when not given."""
        self._model = model
        self.machine = _machine(model)
        name = hashlib.blake2b(json.dumps(self.machine).encode(), digest_size=8).hexdigest()
        self.file = (folder or cache_folder("profiles")) / f"{name}.json"
        self._lock = threading.Lock()
        self._ms: dict[int, float] = {}
        self._gflops: dict[int, float] = {}

    def gflops(self, patch_size: int) -> float:
        """10^9 floating-point operations of one image."""
        with self._lock:
            if patch_size not in self._gflops:
                self._gflops[patch_size] = self._model.vision.gflops(patch_size)
            return self._gflops[patch_size]

    def ms(self, patch_sizes: Sequence[int]) -> dict[int, float]:
        """Milliseconds of one image alone, per patch size; measured where they are not known."""
        with self._lock:
            if not self._ms:
                self._ms = _read(self.file, self.machine)
            missing = [size for size in patch_sizes if size not in self._ms]
            if missing:
                self._ms |= measure_ms(self._model, missing)
                kept = {str(size): round(ms, 3) for size, ms in sorted(self._ms.items())}
                with suppress(OSError):  # with a read-only home the next program measures again
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(self.file, {"format": 1, "machine": self.machine, "ms": kept})
            return {size: self._ms[size] for size in patch_sizes}

    def choose(self, patch_size: PatchSizeOrBudget, allowed: Sequence[int]) -> int:
        """The patch size itself, or the finest of `allowed` within a budget.

        Raises `UsageError` where none is within the budget.
        """
        if patch_size is None:
            return min(allowed)
        if not isinstance(patch_size, Budget):
            return patch_size
        gflops = {size: self.gflops(size) for size in allowed}
        fits = set(allowed)
        cheapest = max(allowed)
        costs = f"{gflops[cheapest]:.3g} GFLOPs"
        if patch_size.max_gflops is not None:
            fits &= {size for size in allowed if gflops[size] <= patch_size.max_gflops}
        if patch_size.max_ms is not None:
            ms = self.ms(allowed)
            fits &= {size for size in allowed if ms[size] <= patch_size.max_ms}
            costs += f" and {ms[cheapest]:.3g} ms"
        if not fits:
            asked = ", ".join(
                f"{name} {value:g}"
                for name, value in (
                    ("max_gflops", patch_size.max_gflops),
                    ("max_ms", patch_size.max_ms),
                )
                if value is not None
            )
            raise UsageError(f"{asked} is too little: patch size {cheapest} costs {costs} an image")
        return min(fits)


def measure_ms(model: LitModel, patch_sizes: Sequence[int]) -> dict[int, float]:
    """Milliseconds of one image alone, per patch size: the minimum of interleaved rounds, which
    other programs disturb least."""
    pixels = torch.randn(1, 3, model.image_size, model.image_size, device=model.device)
    least = dict.fromkeys(patch_sizes, math.inf)
    for _ in range(ROUNDS):
        for size in patch_sizes:
            start = time.perf_counter()
            model.encode_image(pixels, patch_size=size).cpu()  # waits for a GPU
            least[size] = min(least[size], 1e3 * (time.perf_counter() - start))
    return least


def _machine(model: LitModel) -> dict[str, Any]:
    """What the time depends on, and how it is measured."""
    cuda = model.device.type == "cuda"
    config = {**model.vision.describe(), "patch_sizes": None}
    return {
        "tower": hashlib.blake2b(json.dumps(config).encode(), digest_size=8).hexdigest(),
        "dtype": str(next(model.vision.parameters()).dtype),
        "device": torch.cuda.get_device_name(model.device) if cuda else platform.machine(),
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "least_of": ROUNDS,
    }


def _read(file: Path, machine: dict[str, Any]) -> dict[int, float]:
    try:
        found = json.loads(file.read_text())
        if found["format"] == 1 and found["machine"] == machine:
            return {int(size): float(ms) for size, ms in found["ms"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # measured anew
    return {}
