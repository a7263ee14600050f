"""How soon each program answers: `--help`, a mistyped flag, a folder that is not there.

    python benchmarks/answer_time.py
    python benchmarks/answer_time.py --programs search --rounds 1     # a smoke test

Each answer is a process of its own, from its start to its end; the programs answer in turn, and a
figure is the median of the rounds. Then what `import contrastive` costs beyond `import torch`, and
what its names cost, which are loaded on first use.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from lib.harness import Target, finish, interleave

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
NOWHERE = "no/such/folder"
MISSING = {  # program -> a call that is right but for a folder
    "embed": ["--model", NOWHERE, "--shards", f"{NOWHERE}/*.tar", "--out", "out"],
    "export": ["--model", NOWHERE, "--to", "onnx", "--patch-size", "28", "--out", "out"],
    "flexify": ["--resume", NOWHERE],
    "index": ["--embeddings", NOWHERE, "--out", "out"],
    "lit": ["--resume", NOWHERE],
    "search": ["a cat", "--index", NOWHERE],
    "serve": ["--index", NOWHERE],
    "zeroshot": ["--model", NOWHERE, "--root", NOWHERE],
}
ANSWER_S, IMPORT_S = 1.5, 1.0


def answer(arguments: list[str], status: int) -> None:
    """Run Python to its end. Raises SystemExit where that is another than the expected."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode != status or "Traceback" in done.stderr:
        raise SystemExit(f"{arguments} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> None:
    programs = sorted(file.stem for file in LAUNCH.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", default=programs, choices=programs)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    calls = {}
    for program in args.programs:
        file = str(LAUNCH / f"{program}.py")
        calls[f"{program}, help"] = partial(answer, [file, "--help"], 0)
        calls[f"{program}, typo"] = partial(answer, [file, "--no-such-flag", "1"], 2)
        if program in MISSING:
            calls[f"{program}, missing folder"] = partial(answer, [file, *MISSING[program]], 2)
    answers = interleave(calls, args.rounds, warmup=1)

    names = "from contrastive import LitModel, load_vision_tower"
    imports = {"torch": "import torch", "contrastive": "import torch, contrastive", "names": names}
    statements = {name: partial(answer, ["-c", code], 0) for name, code in imports.items()}
    imported = interleave(statements, args.rounds, warmup=1)
    beyond = imported.median("contrastive") - imported.median("torch")

    targets = []
    for what in ("help", "typo", "missing folder"):
        slowest = max(answers.median(name) for name in calls if name.endswith(what))
        targets.append(Target(f"seconds, {what}, the slowest program", f"<= {ANSWER_S}", slowest))
    targets.append(Target("seconds, import contrastive less torch", f"<= {IMPORT_S}", beyond))
    figures = {
        "answers": answers.figures(),
        "imports": imported.figures(),
        "import_of_names_less_torch_s": imported.median("names") - imported.median("torch"),
    }
    finish("answer_time", figures, targets, packages=("torch", "tyro"), where="cpu")


if __name__ == "__main__":
    main()
