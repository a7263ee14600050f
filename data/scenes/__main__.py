"""Build scenes with exact masks and boxes: drawings of emoji on textured grounds.

python -m data.scenes OUT               # 3 x 200 scenes, a minute or so on two cores
python -m data.scenes OUT --count 20    # fewer, for trying things
python -m data.scenes OUT --kinds       # masks of six kinds, which held-out things have too
python -m data.scenes OUT --boxes       # train/ shows every trained thing, with boxes alone
"""

import argparse
from pathlib import Path

from data.errors import exit_on_usage_error
from data.scenes.build import KINDS, SPLITS, build_scenes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.scenes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to build; must be new, empty, or built")
    parser.add_argument(
        "--count", type=int, default=200, help="scenes of each of the three folders"
    )
    parser.add_argument("--size", type=int, default=224, help="their side, pixels (default: 224)")
    parser.add_argument("--classes", type=int, default=50, help="things to draw (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", action="store_true", help=f"the classes are {', '.join(KINDS)}, not each thing"
    )
    parser.add_argument(
        "--boxes", action="store_true", help="train/ shows every trained thing, with boxes alone"
    )
    args = parser.parse_args()
    with exit_on_usage_error():
        out = build_scenes(
            args.out, args.count, args.size, args.classes, args.seed,
            kinds=args.kinds, boxes=args.boxes,
        )  # fmt: skip
        print(f"{out}: {args.count} scenes in each of {', '.join(SPLITS)}")


if __name__ == "__main__":
    main()
