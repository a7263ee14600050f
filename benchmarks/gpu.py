"""Everything that a GPU is to show, in parts of at most nine minutes each.

    python benchmarks/gpu.py                  # what is missing in results/gpu.json, part after part
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --part tokens_22 [--part index]
    python benchmarks/gpu.py --tiny           # every part in seconds on a CPU: that the code runs

All data are made on the spot, weights are random, and nothing is downloaded. Each part runs in a
process of its own and adds its figures to the result file, so that one can stop at any time and go
on later. ViT-B/16 at 240 px, BERT-base, bfloat16; captions of 22 tokens on average, as CC12M's, or
of 7. Targets are written by a GPU at full size alone.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.gpu.results import Part, read, record
from lib.gpu.scale import CUDA, TINY, Scale

LIMIT_S = 540
PARTS = (
    Part("exact", "exact search of a million vectors, beside FAISS's", "search.exactly"),
    Part("index", "building an ivf of a million vectors, and searching it", "search.lists"),
    Part("patch_sizes", "images/s by patch size", "pixels.by_patch_size"),
    Part("timm", "the locked forward against timm's plain ViT", "pixels.against_timm"),
    Part("packed", "pictures of several shapes and budgets as one sequence", "pixels.packed"),
    Part("tokens_22", "a cached step against open_clip's, 22 tokens", "cached.tokens_22"),
    Part("tokens_7", "a cached step against open_clip's, 7 tokens", "cached.tokens_7"),
    Part("minilm", "a cached step of MiniLM-L6, 16 tokens", "cached.minilm"),
    Part("embedding", "embedding JPEG tars, and who decodes them", "jpegs.embedding"),
    Part("uncached", "training from JPEGs, at patch 16 and at random sizes", "cached.uncached"),
    Part("memory", "peak memory of a step against the batch", "memory.memory"),
    Part("million", "the loss of a million pairs, and a step", "memory.million"),
    Part("losses", "the loss beside memeff's, inf-cl's and open_clip's", "memory.losses"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--part", action="append", choices=names, help="this one, done or not")
    parser.add_argument("--list", action="store_true", help="parts, and which are done")
    parser.add_argument("--tiny", action="store_true", help="a small run, on any machine")
    parser.add_argument("--folder", type=Path, help="where data lie (10 GB); kept for other parts")
    args = parser.parse_args()
    done = read(args.tiny)
    if args.list:
        for part in PARTS:
            print(f"{'done' if part.name in done else 'missing':8}{part.name:12}{part.what}")
        return
    if not CUDA and not args.tiny:
        sys.exit("there is no GPU here; --tiny shows that the parts run")
    folder = args.folder or Path(tempfile.gettempdir()) / "flexilit-gpu-benchmark"
    folder = folder / ("tiny" if args.tiny else "full")
    if args.part and len(args.part) == 1:
        (chosen,) = (part for part in PARTS if part.name == args.part[0])
        measure(chosen, TINY if args.tiny else Scale(), folder)
        return
    wanted = args.part or [name for name in names if name not in done]
    flags = (["--tiny"] if args.tiny else []) + (
        ["--folder", str(args.folder)] if args.folder else []
    )
    failed = [name for name in wanted if not _in_own_process(name, flags)]
    if failed:
        sys.exit(f"missed targets, failed, or took longer than {LIMIT_S} s: {', '.join(failed)}")


def measure(part: Part, scale: Scale, folder: Path) -> None:
    """One part, in this process; status 1 where it misses a target."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    measured = part.measure(scale, folder)
    if record(part, measured, time.perf_counter() - start, scale.tiny):
        sys.exit(1)


def _in_own_process(name: str, flags: list[str]) -> bool:
    print(f"---- {name}", flush=True)
    command = [sys.executable, __file__, "--part", name, *flags]
    try:
        return subprocess.run(command, timeout=LIMIT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


if __name__ == "__main__":
    main()
