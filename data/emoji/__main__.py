"""Build the offline default data: WebDataset shards of emoji, drawn by several artists.

python -m data.emoji OUT              # everything, about half a minute on two cores
python -m data.emoji OUT --limit 40   # a small one, for trying things
"""

import argparse
import json
from pathlib import Path

from data.emoji.build import build_emoji
from data.errors import exit_on_usage_error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.emoji", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to build; must be new, empty, or built")
    parser.add_argument("--limit", type=int, help="only this many concepts (default: all)")
    parser.add_argument("--size", type=int, default=224, help="images' side, pixels (default: 224)")
    args = parser.parse_args()
    with exit_on_usage_error():
        out = build_emoji(args.out, args.size, args.limit)
        print(f"{out}: {json.dumps(json.loads((out / 'manifest.json').read_text())['counts'])}")


if __name__ == "__main__":
    main()
