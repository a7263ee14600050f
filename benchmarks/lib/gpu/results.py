"""One result file for all parts: what is there is kept, what is missing can be measured later."""

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from contrastive.run.config_file import revision
from lib.gpu.scale import CUDA, Scale
from lib.harness import RESULTS, Target, machine, versions

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "open_clip_torch", "deepspeed", "numpy",
    "simplejpeg", "faiss-gpu", "faiss-gpu-cuvs", "memeff", "inf-cl",
)  # fmt: skip

Measured = tuple[Mapping[str, Any], Sequence[Target]]


@dataclass(frozen=True)
class Part:
    """A measurement of at most nine minutes. function: module of this folder, and its function."""

    name: str
    what: str
    function: str

    def measure(self, scale: Scale, folder: Path) -> Measured:
        """Run it. folder: holds data that parts share. Modules are imported here: each is slow to
        import, and a part needs one."""
        module, _, name = self.function.partition(".")
        function: Callable[[Scale, Path], Measured] = getattr(
            importlib.import_module(f"lib.gpu.{module}"), name
        )
        return function(scale, folder)


def result_file(tiny: bool) -> Path:
    """Where all parts are written."""
    return RESULTS / ("gpu.tiny.json" if tiny else "gpu.json")


def read(tiny: bool) -> dict[str, Any]:
    """The parts that were measured, by name."""
    file = result_file(tiny)
    return json.loads(file.read_text())["figures"] if file.is_file() else {}


def record(part: Part, measured: Measured, seconds: float, tiny: bool) -> list[Target]:
    """Write a part's figures beside those of others. Targets count on a GPU at full size alone:
    returns those that were missed."""
    figures, targets = measured
    targets = [] if tiny or not CUDA else list(targets)
    rows = [
        {"what": t.what, "wanted": t.wanted, "got": t.got, "met": t.met, "part": part.name}
        for t in targets
    ]
    file = result_file(tiny)
    before = json.loads(file.read_text()) if file.is_file() else {"figures": {}, "targets": []}
    kept = [row for row in before["targets"] if row["part"] != part.name]
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "revision": revision(),
        "machine": machine(),
        "seconds": round(seconds, 1),
    }
    installed = {dist.name for dist in importlib.metadata.distributions()}
    packages = [name for name in PACKAGES if name in installed]
    result = {
        "name": "gpu",
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        **{name: about[name] for name in ("date", "revision", "machine")},
        "versions": versions(packages),
        "figures": before["figures"] | {part.name: {**about, **figures}},
        "targets": kept + rows,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(file)
    for row in rows:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['what']}: {row['got']:.3f} (wanted {row['wanted']}, {verdict})")
    print(f"wrote {part.name} into {file}")
    return [target for target in targets if not target.met]
