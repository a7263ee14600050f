"""What one image costs a model at each patch size or budget of tokens, and the finest that costs at
most so much.

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
from data.files import cache_folder, write_json
from data.numbers import rounded
from retrieval.detail import (
    Detail,
    MaxTokens,
    as_key,
    coarsest,
    finest,
    from_key,
    num_tokens,
    said,
)
from retrieval.machine_load import OthersLoad, warn_if_busy
from retrieval.search.config import Budget, PatchSizeOrBudget
from retrieval.tower_speed import square_image, time_forwards

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
        self._ms: dict[Detail, float] = {}
        self._gflops: dict[Detail, float] = {}
        self._source = ""  # of the times, for messages

    def gflops(self, patch_size: Detail) -> float:
        """10^9 floating-point operations of one image."""
        with self._lock:
            if patch_size not in self._gflops:
                self._gflops |= _read_gflops(self.file, self.machine)
            if patch_size not in self._gflops:  # torch's counter imports its compiler first
                patch, shape = square_image(self._model.vision, patch_size)
                self._gflops[patch_size] = self._model.vision.gflops(patch, shape)
                self._keep_gflops()
            return self._gflops[patch_size]

    def _keep_gflops(self) -> None:
        """With the times, where those are known."""
        record = _record(self.file, self.machine)
        if record is not None:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._gflops = _read_gflops(self.file, self.machine) | self._gflops
        gflops = {str(as_key(s)): self._gflops[s] for s in sorted(self._gflops, key=_order)}
        with suppress(OSError):  # with a read-only home the next program measures again
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {**record, "gflops": gflops})

    def ms(self, patch_sizes: Sequence[Detail], tell: bool = True) -> dict[Detail, float]:
        """Milliseconds of one image alone, per patch size; measured where they are not known.

        tell: whether stderr is told where other programs disturb that.
        """
        with self._lock:
            if not self._ms:
                self._ms, self._source = _read(self.file, self.machine)
            if not self._ms.keys() >= set(patch_sizes):
                wanted = sorted(self._ms.keys() | set(patch_sizes), key=_order, reverse=True)
                self._measure(wanted, tell)
            return {size: self._ms[size] for size in patch_sizes}

    def _measure(self, patch_sizes: Sequence[Detail], tell: bool) -> None:
        """Spells of rounds until two agree on times that rise with the operations."""
        load, settled = OthersLoad(), False
        ms = measure_ms(self._model, patch_sizes)
        for _ in range(SPELLS - 1):
            again = measure_ms(self._model, patch_sizes)
            agree = all(max(ms[s], again[s]) <= AGREE * min(ms[s], again[s]) for s in ms)
            ms = {size: min(ms[size], again[size]) for size in ms}
            if settled := agree and self._in_order(ms):
                break
        busy = warn_if_busy(load.share(), "the times of patch sizes", tell)
        disturbed = busy or not settled
        record = {
            "format": 1,
            "machine": self.machine,
            "measured": datetime.now().isoformat(timespec="seconds"),
            "spell": "disturbed" if disturbed else "quiet",
            "ms": {str(as_key(size)): round(ms[size], 3) for size in sorted(ms, key=_order)},
        }
        self._ms, self._source = ms, _source(record, self.file)
        self._write(record)

    def _in_order(self, ms: Mapping[Detail, float]) -> bool:
        """Whether no patch size takes much longer than one of more operations."""
        by_cost = sorted(ms, key=self.gflops)
        return all(
            ms[cheap] <= IN_ORDER * ms[dear]
            for place, cheap in enumerate(by_cost)
            for dear in by_cost[place + 1 :]
        )

    def encoding(self, asked: PatchSizeOrBudget, allowed: Sequence[Detail]) -> Detail:
        """At what to encode an image: a patch size or a budget of tokens itself; of what it may
        cost, the finest of `allowed`, or where these are budgets, what tokens that buys.

        Raises `UsageError` as `choose`.
        """
        if isinstance(asked, MaxTokens):
            return asked
        found = self.choose(asked, allowed)
        if isinstance(found, int) or not isinstance(asked, Budget):
            return found
        finer = [d for d in allowed if isinstance(d, MaxTokens) and d > found]
        if not finer:
            return found
        above, limits = min(finer), []
        for limit, of in (
            (asked.max_gflops, {d: self.gflops(d) for d in (found, above)}),
            (asked.max_ms, self.ms(allowed) if asked.max_ms is not None else {}),
        ):
            if limit is not None and of[above] > limit:  # the cost rises ever faster with tokens
                part = (limit - of[found]) / (of[above] - of[found])
                limits.append(found.count + int(part * (above.count - found.count)))
        return MaxTokens(min(limits))

    def choose(self, patch_size: PatchSizeOrBudget, allowed: Sequence[Detail]) -> Detail:
        """The patch size itself, or the finest of `allowed` within a budget.

        Raises `UsageError` where none is within the budget.
        """
        if patch_size is None:
            return finest(allowed)
        if isinstance(patch_size, MaxTokens):
            return self._within(patch_size, allowed)
        if not isinstance(patch_size, Budget):
            return patch_size
        gflops = {size: self.gflops(size) for size in allowed}
        fits = set(allowed)
        cheapest = coarsest(allowed)
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
                f"{asked} is too little: {_named(cheapest)} costs {costs} an image{source}"
            )
        return finest(fits)

    def _within(self, budget: MaxTokens, allowed: Sequence[Detail]) -> Detail:
        """The finest of `allowed` that takes no more tokens."""
        tokens = {detail: num_tokens(detail, self._model.image_size) for detail in allowed}
        fits = [detail for detail in allowed if tokens[detail] <= budget.count]
        if not fits:
            cheapest = coarsest(allowed)
            takes = "" if isinstance(cheapest, MaxTokens) else f", {tokens[cheapest]} tokens"
            raise UsageError(
                f"max_tokens {budget.count} is too little: the coarsest is {said(cheapest)}{takes}"
            )
        return finest(fits)


def _named(detail: Detail) -> str:
    return f"patch size {detail}" if isinstance(detail, int) else f"a budget of {detail}"


def _order(detail: Detail) -> tuple[bool, Detail]:
    return isinstance(detail, MaxTokens), detail


def measure_ms(model: LitModel, patch_sizes: Sequence[Detail]) -> dict[Detail, float]:
    """Milliseconds of one image alone, per patch size: the minimum of interleaved rounds, which
    other programs disturb least."""
    squares = {detail: square_image(model.vision, detail) for detail in patch_sizes}

    def forward(pixels: torch.Tensor, detail: Detail) -> torch.Tensor:
        return model.encode_image(pixels, patch_size=squares[detail][0])

    seconds = time_forwards(
        forward, model.image_size, model.device, dict.fromkeys(patch_sizes, 1), ROUNDS,
        shapes={detail: shape for detail, (_, shape) in squares.items()},
    )  # fmt: skip
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


def _read(file: Path, machine: dict[str, Any]) -> tuple[dict[Detail, float], str]:
    """What was measured, and `_source`; nothing where that is too long ago, or where 0.1.0 did it,
    which kept for ever what other programs disturbed."""
    found = _record(file, machine)
    try:
        if found is not None:
            age = datetime.now() - datetime.fromisoformat(found["measured"])
            if timedelta(0) <= age < KEPT[found["spell"]]:
                ms = {from_key(size): float(ms) for size, ms in found["ms"].items()}
                return ms, _source(found, file)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # measured anew
    return {}, ""


def _read_gflops(file: Path, machine: dict[str, Any]) -> dict[Detail, float]:
    try:
        kept = (_record(file, machine) or {}).get("gflops", {})
        return {from_key(size): float(gflops) for size, gflops in kept.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _source(record: Mapping[str, Any], file: Path) -> str:
    """Where times come from, for messages."""
    beside = " beside other programs" if record["spell"] == "disturbed" else ""
    place = str(file).replace(str(Path.home()), "~", 1)
    return f"measured {record['measured']}{beside}, delete {place} to measure anew"
