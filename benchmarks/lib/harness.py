"""Interleaved timing, facts about the machine, and the result file of every benchmark.

Contenders run in turn, round after round, so that a machine that slows down slows all of them. A
ratio is the ratio of medians; the ratios within rounds show the spread.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from contrastive.distributed import synchronize
from contrastive.run.config_file import revision

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or ROOT / "benchmarks" / "results")


@dataclass(frozen=True)
class Timings:
    """Seconds per round and contender, measured in turn."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def quartiles(self, name: str) -> tuple[float, float]:
        """First and third quartile, seconds."""
        low, high = np.percentile(self.seconds[name], (25, 75))
        return float(low), float(high)

    def ratio(self, numerator: str, denominator: str) -> float:
        """The ratio of medians."""
        return self.median(numerator) / self.median(denominator)

    def round_ratios(self, numerator: str, denominator: str) -> list[float]:
        """The ratio within each round."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return [a / b for a, b in pairs]

    def figures(self) -> dict[str, Any]:
        """Per contender: median and quartiles in seconds, and the number of rounds."""
        return {
            name: {
                "median_s": self.median(name),
                "quartiles_s": list(self.quartiles(name)),
                "rounds": len(self.seconds[name]),
            }
            for name in self.seconds
        }


def interleave(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time each function once per round, for `repeats` rounds after `warmup` untimed ones.

    The order rotates from round to round, so that nobody always runs in another's warm cache.
    A GPU is waited for before and after each call.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: at least 1")
    names = list(fns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            start = clock()
            fns[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(clock() - start)
    return Timings(seconds)


def run_demo() -> None:
    """`make demo`'s program, which passes over what it has done."""
    subprocess.run([sys.executable, str(ROOT / "launch" / "demo.py")], check=True, cwd=ROOT)


# ---- the result file -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A bound on a figure, written as `>= 0.97` or `<= 60`."""

    what: str
    wanted: str
    got: float

    @property
    def met(self) -> bool:
        sign, _, bound = self.wanted.partition(" ")
        if sign not in (">=", "<="):
            raise ValueError(f"target {self.wanted!r}: allowed are '>= NUMBER' and '<= NUMBER'")
        return self.got >= float(bound) if sign == ">=" else self.got <= float(bound)


def machine() -> dict[str, Any]:
    """CPU, cores, threads that torch uses, memory, and the GPU if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(packages: Sequence[str] = ("torch", "timm", "numpy")) -> dict[str, str]:
    """Python's version, and those of installed packages."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def finish(
    name: str,
    figures: Mapping[str, Any],
    targets: Sequence[Target],
    plot: Callable[[Path], None] | None = None,
    packages: Sequence[str] = ("torch", "timm", "numpy"),
    where: Literal["auto", "cpu", "gpu"] = "auto",
    accepted: Mapping[str, str] | None = None,
) -> None:
    """Write `results/NAME.json`, or `NAME.gpu.json` where a GPU was used, and print the targets.

    plot: draws into the PNG file it is given, beside the JSON. packages: whose versions matter.
    accepted: `Target.what` -> why it may be missed; the reason is written beside the target.
    Exits with status 1 where any other target is missed, so call it last.
    """
    gpu = torch.cuda.is_available() if where == "auto" else where == "gpu"
    file = RESULTS / f"{name}{'.gpu' if gpu else ''}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    reasons = accepted or {}
    rows: list[dict[str, Any]] = []
    for target in targets:
        row = {"what": target.what, "wanted": target.wanted, "got": target.got, "met": target.met}
        if not target.met and target.what in reasons:
            row["accepted"] = reasons[target.what]
        rows.append(row)
    result = {
        "name": name,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision(),
        "machine": machine(),
        "versions": versions(packages),
        "figures": figures,
        "targets": rows,
    }
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(file)
    if plot is not None:
        plot(file.with_suffix(".png"))
    missed = [row for row in rows if not row["met"] and "accepted" not in row]
    for row in rows:
        verdict = "met" if row["met"] else "MISSED" if row in missed else "missed, accepted"
        print(f"{row['what']}: {row['got']:.3f} (wanted {row['wanted']}, {verdict})")
    print(f"wrote {file}")
    if missed:
        sys.exit(1)
