"""Photographs for evaluation, fetched from a Debian package by its name.

python -m data.photographs OUT
python launch/zeroshot.py --model runs/demo/model --dataset shards --root OUT
"""

import argparse
from pathlib import Path

from data.errors import exit_on_usage_error
from data.photographs.build import build_photographs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.photographs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to write; must be new, empty, or built")
    args = parser.parse_args()
    with exit_on_usage_error():
        print(build_photographs(args.out))


if __name__ == "__main__":
    main()
