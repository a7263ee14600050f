"""Faults on purpose, counted: kills, flipped bits, full disks, two writers, bad visitors.

    python benchmarks/faults.py [--only kills flips] [--seed 0] [--kills 15] [--flips 4]

A fault is noticed (one sentence, and the same command succeeds afterwards), without effect (the
result is that of an undisturbed run), or lost: another result, a traceback, a program that hangs.
Target: none is lost. `search.py` without `--check` promises nothing of flipped bits: what they do
to it is counted by itself. Everything happens to a small world that is made first, through the
programs in launch/. About 15 minutes on two cores.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lib.faults.flips import flip_bits
from lib.faults.kills import kill_programs, kill_training, train_calmly
from lib.faults.strain import fill_disks, write_twice
from lib.faults.tally import Tally
from lib.faults.visitors import embed_hostile, hold_service
from lib.faults.world import make_world
from lib.harness import Target, finish

PARTS = ("kills", "flips", "strain", "visitors")


def campaign(root: Path, args: argparse.Namespace) -> Iterator[Tally]:
    """Every kind of fault, one after the other."""
    world = make_world(root)
    trained = root / "calm_training"
    if {"kills", "flips"} & set(args.only):
        train_calmly(world, trained)
    if "visitors" in args.only:
        yield from hold_service(world, silent=1200)
        yield embed_hostile(world)
    if "strain" in args.only:
        yield from fill_disks(world, args.seed)
        yield from write_twice(world, args.kills // 5, args.seed)
    if "flips" in args.only:
        yield from flip_bits(world, trained, args.flips, args.seed)
    if "kills" in args.only:
        yield kill_training(world, trained, args.kills // 6, args.seed)
        yield from kill_programs(world, args.kills, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=15, help="of each program")
    parser.add_argument("--flips", type=int, default=4, help="bits of each file")
    args = parser.parse_args()
    tallies: list[Tally] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for tally in campaign(Path(root), args):
            tallies.append(tally)
            print(f"{tally.what}: {tally.figures()}", flush=True)
    figures = {
        "seed": args.seed,
        "seconds": round(time.monotonic() - started),
        "faults": {tally.what: tally.figures() for tally in tallies},
        "tried": sum(tally.tried for tally in tallies),
        "noticed": sum(tally.noticed for tally in tallies),
        "without_effect": sum(tally.harmless for tally in tallies),
        "unpromised": sum(tally.unpromised.total() for tally in tallies),
    }
    targets = [Target("faults lost", "<= 0", sum(len(tally.lost) for tally in tallies))]
    packages = ("torch", "deepspeed", "faiss-gpu", "pyarrow", "pillow", "uvicorn")
    finish("faults", figures, targets, packages=packages)


if __name__ == "__main__":
    main()
