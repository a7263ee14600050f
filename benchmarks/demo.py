"""What `make demo` gives: accuracy on held-out captions and on a style never seen, and its time.

    python benchmarks/demo.py

Runs the demo (what is done is not done again) and reads its report. The time counts only when the
whole demo ran just now.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness import Target, write_result

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def main() -> None:
    fresh = not (ROOT / "runs").exists()
    started = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "launch" / "demo.py")], check=True, cwd=ROOT)
    minutes = (time.monotonic() - started) / 60
    report = json.loads((ROOT / "runs" / "report" / "report.json").read_text())
    speeds = {p["patch_size"]: p["images_per_second"]["median"] for p in report["patch_sizes"]}
    figures = {"patch_sizes": report["patch_sizes"], "datasets": report["datasets"]}
    targets = []
    for dataset in report["datasets"]:
        best = max(dataset["accuracy"].values(), key=lambda a: a["top1"]["value"])
        for k, wanted in (("top1", 0.25), ("top5", 0.50)):
            what = f"{dataset['name']}, {k}, best patch size"
            targets.append(Target(what, f">= {wanted}", round(best[k]["value"], 4)))
    ratio = speeds[max(speeds)] / speeds[min(speeds)]
    what = f"images/s at patch {max(speeds)} over patch {min(speeds)}"
    targets.append(Target(what, ">= 5", round(ratio, 2)))
    if fresh:
        figures["minutes"] = round(minutes, 1)
        targets.append(Target("minutes of the whole demo", "<= 20", round(minutes, 1)))
    write_result("demo", figures, targets)
    DOCS.mkdir(exist_ok=True)
    shutil.copy(ROOT / "runs" / "report" / "accuracy.png", DOCS / "accuracy.png")
    shutil.copy(ROOT / "runs" / "hits.png", DOCS / "hits.png")


if __name__ == "__main__":
    main()
