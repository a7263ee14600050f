"""The whole pipeline on the default drawings: build, train, embed, index, evaluate, search; and
photographs found by words, where apt can fetch them.

    make demo                     # or: python launch/demo.py [--out runs]

Every stage is a command line that a user could type. Finished stages are skipped.
"""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from data.errors import exit_on_usage_error
from data.files import write_text_atomically

LAUNCH = Path(__file__).parent
QUERIES = (
    "a happy cat",
    "something to eat with",
    "a red vehicle",
    "bad weather",
    "a musical instrument",
    "someone doing sports",
    "a yellow fruit",
    "I am in love",
)
QUERIES_FOR_PHOTOGRAPHS = (
    "a bird",
    "a farm animal",
    "a red fruit",
    "a vegetable",
    "a musical instrument",
    "a vehicle",
    "a tool",
    "a flower",
)
CREDIT = (
    "Photographs: Tux Paint's artists (Bill Kendrick and contributors), from Debian's "
    "tuxpaint-stamps-default, GPL-2, put on white. The model has seen drawings alone."
)


@dataclass(frozen=True)
class Args:
    out: str = "runs"
    """Folder for data, model, index and results."""


def last_checkpoint(run: Path) -> Path:
    """The file that a training writes last, or one that never exists before the run does."""
    config = run / "config.json"
    steps = json.loads(config.read_text())["train"]["steps"] if config.exists() else 0
    return run / f"checkpoints/step_{steps:08d}/state.json"


def status_of(command: list[str]) -> int:
    """Run a command. At Ctrl-C, which it gets too, it is waited for while it saves and cleans up;
    a second one kills it. Raises `KeyboardInterrupt` then."""
    stopped = False

    def wait(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, wait)
    try:
        code = subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    if stopped:
        raise KeyboardInterrupt
    return code


def stage(timings: Path, title: str, makes: Path, *command: str, optional: bool = False) -> bool:
    """Run a command unless what it makes last is there. When it fails, stop the demo, or return
    False where the stage is optional."""
    if makes.exists():
        print(f"\n== {title}: done before, {makes}", flush=True)
        return True
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    programs = {
        "python": sys.executable,
        "deepspeed": str(Path(sys.executable).parent / "deepspeed"),
    }
    started = time.monotonic()
    code = status_of([programs[command[0]], *command[1:]])
    if code and optional:
        print(f"== {title}: status {code}; the demo goes on without", flush=True)
        return False
    if code:
        print(f"== {title} stopped with status {code}; what was done is kept", file=sys.stderr)
        sys.exit(code)
    seconds = round(time.monotonic() - started, 1)
    print(f"== {title}: {seconds:.0f} s", flush=True)
    done = json.loads(timings.read_text()) if timings.exists() else {}
    write_text_atomically(timings, json.dumps(done | {title: seconds}, indent=1) + "\n")
    return True


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    out = Path(args.out).resolve()
    os.chdir(LAUNCH.parent)
    if out.is_relative_to(LAUNCH.parent):
        out = out.relative_to(LAUNCH.parent)
    data, run, index = out / "data/emoji", out / "demo", out / "index"
    report, sheet = out / "report", out / "hits.png"
    train = ["demo", "--out", str(out), "--data.shards", f"{data}/train/*.tar"]
    train += ["--data.features", f"{out}/features"]
    if any((run / "checkpoints").glob("step_*/state.json")):
        train = ["--resume", str(run)]

    started = time.monotonic()
    run_stage = functools.partial(stage, out / "timings.json")
    run_stage("drawings", data, "python", "-m", "data.emoji", str(data))
    run_stage("training", last_checkpoint(run), "deepspeed", "launch/lit.py", *train)

    def embed_and_index(what: str, shards: str, embeddings: Path, index: Path) -> None:
        run_stage(
            f"embedding {what}", embeddings,
            "python", "launch/embed.py", "--model", f"{run}/model", "--shards", shards,
            "--patch-sizes", "28", "56", "--out", str(embeddings),
        )  # fmt: skip
        run_stage(
            f"index of {what}", index,
            "python", "launch/index.py", "--embeddings", str(embeddings), "--out", str(index),
        )  # fmt: skip

    embed_and_index("every drawing", f"{data}/*/*.tar", out / "embeddings", index)
    run_stage(
        "zero-shot evaluation", report / "report.json",
        "python", "launch/zeroshot.py", "--model", f"{run}/model", "--root",
        f"{data}/heldout_captions", f"{data}/heldout_style", "--recall", "--out", str(report),
    )  # fmt: skip
    run_stage(
        "search", sheet,
        "python", "launch/search.py", *QUERIES, "--index", str(index), "-k", "6",
        "--picture", str(sheet),
    )  # fmt: skip

    photographs, album = out / "data/photographs", out / "photographs"
    fetched = run_stage(
        "photographs", photographs, "python", "-m", "data.photographs", str(photographs),
        optional=True,
    )  # fmt: skip
    if fetched:
        shards = f"{photographs}/*.tar"
        embed_and_index("the photographs", shards, album / "embeddings", album / "index")
        run_stage(
            "search in the photographs", album / "hits.png",
            "python", "launch/search.py", *QUERIES_FOR_PHOTOGRAPHS, "--index", f"{album}/index",
            "-k", "6", "--picture", f"{album}/hits.png", "--credit", CREDIT,
        )  # fmt: skip

    print(f"\n{(report / 'report.txt').read_text()}")
    print(f"table and plot: {report}/report.md, {report}/accuracy.png")
    print(f"found by words: {sheet}" + (f", {album}/hits.png" if fetched else ""))
    print(f"the demo took {time.monotonic() - started:.0f} s. Next, try:\n")
    print("  . .venv/bin/activate")
    print(f'  python launch/search.py "a sleepy animal" "time to celebrate" --index {index} '
          "--picture mine.png")  # fmt: skip
    print(f"  python launch/zeroshot.py --model {run}/model --dataset folder --root YOUR_PHOTOS")
    print(f"  deepspeed launch/lit.py demo --name longer --out {out} --steps 2000 "
          f"--data.shards '{data}/train/*.tar' --data.features {out}/features")  # fmt: skip


if __name__ == "__main__":
    with exit_on_usage_error():
        main()
