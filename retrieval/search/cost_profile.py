"""What one image costs a model at each patch size, and the finest within a budget.

Times are measured one image at a time, and kept under `profiles` of the cache folder: for thirty
days, or for an hour where other programs disturbed them. So are counts of operations, for good.
"""

import hashlib
import json
import platform
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.files import cache_folder
from data.numbers import rounded
from retrieval.json_files import write_json
from retrieval.machine_load import OthersLoad, warn_if_busy
from retrieval.search.config import Budget, PatchSizeOrBudget
from retrieval.tower_speed import time_forwards

ROUNDS = 5
SPELLS = 4  # of so many rounds, until two agree
AGREE = 1.3  # how far apart two times of one patch size may be
IN_ORDER = 1.5  # how much longer than a dearer patch size a cheaper one may take
KEPT = {"quiet": timedelta(days=30), "disturbed": timedelta(hours=1)}


class CostProfile:
    """What one image costs a model on this machine, per patch size. Safe for threads."""

    def __init__(self, model: LitModel, folder: Path | None = None) -> None:
        """folder: where measurements are kept; the user's cache when not given."""
        self._model = model
        self.machine = _machine(model)
        name = hashlib.blake2b(json.dumps(self.machine).encode(), digest_size=8).hexdigest()
        self.file = (folder or cache_folder("profiles")) / f"{name}.json"
        self._lock = threading.RLock()
        self._ms: dict[int, float] = {}
        self._gflops: dict[int, float] = {}
        self._source = ""  # of the times, for messages

    def gflops(self, patch_size: int) -> float:
        """10^9 floating-point operations of one image."""
        with self._lock:
            if patch_size not in self._gflops:
                self._gflops |= _read_gflops(self.file, self.machine)
            if patch_size not in self._gflops:  # torch's counter imports its compiler first
                self._gflops[patch_size] = self._model.vision.gflops(patch_size)
                self._keep_gflops()
            return self._gflops[patch_size]

    def _keep_gflops(self) -> None:
        """With the times, where those are known."""
        record = _record(self.file, self.machine)
        if record is not None:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._gflops = _read_gflops(self.file, self.machine) | self._gflops
        gflops = {str(size): self._gflops[size] for size in sorted(self._gflops)}
        with suppress(OSError):  # with a read-only home the next program measures again
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {**record, "gflops": gflops})

    def ms(self, patch_sizes: Sequence[int]) -> dict[int, float]:
        """Milliseconds of one image alone, per patch size; measured where they are not known."""
        with self._lock:
            if not self._ms:
                self._ms, self._source = _read(self.file, self.machine)
            if not self._ms.keys() >= set(patch_sizes):
                self._measure(sorted(self._ms.keys() | set(patch_sizes), reverse=True))
            return {size: self._ms[size] for size in patch_sizes}

    def _measure(self, patch_sizes: Sequence[int]) -> None:
        """Spells of rounds until two agree on times that rise with the operations."""
        load, settled = OthersLoad(), False
        ms = measure_ms(self._model, patch_sizes)
        for _ in range(SPELLS - 1):
            again = measure_ms(self._model, patch_sizes)
            agree = all(max(ms[s], again[s]) <= AGREE * min(ms[s], again[s]) for s in ms)
            ms = {size: min(ms[size], again[size]) for size in ms}
            if settled := agree and self._in_order(ms):
                break
        disturbed = warn_if_busy(load.share(), "the times of patch sizes") or not settled
        record = {
            "format": 1,
            "machine": self.machine,
            "measured": datetime.now().isoformat(timespec="seconds"),
            "spell": "disturbed" if disturbed else "quiet",
            "ms": {str(size): round(ms[size], 3) for size in sorted(ms)},
        }
        self._ms, self._source = ms, _source(record, self.file)
        self._write(record)

    def _in_order(self, ms: Mapping[int, float]) -> bool:
        """Whether no patch size takes much longer than one of more operations."""
        by_cost = sorted(ms, key=self.gflops)
        return all(
            ms[cheap] <= IN_ORDER * ms[dear]
            for place, cheap in enumerate(by_cost)
            for dear in by_cost[place + 1 :]
        )

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
        costs = f"{rounded(gflops[cheapest], 3)} GFLOPs"
        if patch_size.max_gflops is not None:
            fits &= {size for size in allowed if gflops[size] <= patch_size.max_gflops}
        if patch_size.max_ms is not None:
            ms = self.ms(allowed)
            fits &= {size for size in allowed if ms[size] <= patch_size.max_ms}
            costs += f" and {rounded(ms[cheapest], 3)} ms"
        if not fits:
            asked = ", ".join(
                f"{name} {value:g}"
                for name, value in (
                    ("max_gflops", patch_size.max_gflops),
                    ("max_ms", patch_size.max_ms),
                )
                if value is not None
            )
            source = f" ({self._source})" if patch_size.max_ms is not None else ""
            raise UsageError(
                f"{asked} is too little: patch size {cheapest} costs {costs} an image{source}"
            )
        return min(fits)


def measure_ms(model: LitModel, patch_sizes: Sequence[int]) -> dict[int, float]:
    """Milliseconds of one image alone, per patch size: the minimum of interleaved rounds, which
    other programs disturb least."""
    seconds = time_forwards(
        model.encode_image, model.image_size, model.device, dict.fromkeys(patch_sizes, 1), ROUNDS
    )
    return {size: 1e3 * min(seconds[size]) for size in patch_sizes}


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


def _record(file: Path, machine: dict[str, Any]) -> dict[str, Any] | None:
    """What was kept of this model on this machine, None for nothing or a damaged file."""
    try:
        found = json.loads(file.read_text())
        return found if found["format"] == 1 and found["machine"] == machine else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(file: Path, machine: dict[str, Any]) -> tuple[dict[int, float], str]:
    """What was measured, and `_source`; nothing where that is too long ago, or where 0.1.0 did it,
    which kept for ever what other programs disturbed."""
    found = _record(file, machine)
    try:
        if found is not None:
            age = datetime.now() - datetime.fromisoformat(found["measured"])
            if timedelta(0) <= age < KEPT[found["spell"]]:
                ms = {int(size): float(ms) for size, ms in found["ms"].items()}
                return ms, _source(found, file)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # measured anew
    return {}, ""


def _read_gflops(file: Path, machine: dict[str, Any]) -> dict[int, float]:
    try:
        kept = (_record(file, machine) or {}).get("gflops", {})
        return {int(size): float(gflops) for size, gflops in kept.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _source(record: Mapping[str, Any], file: Path) -> str:
    """Where times come from, for messages."""
    beside = " beside other programs" if record["spell"] == "disturbed" else ""
    place = str(file).replace(str(Path.home()), "~", 1)
    return f"measured {record['measured']}{beside}, delete {place} to measure anew"
