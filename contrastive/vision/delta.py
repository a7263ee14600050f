"""Program: store a tower as its difference from another one, a small file after a small change.

python -m contrastive.vision.delta runs/dinov2s/model dinov2s changed.safetensors
"""

import argparse

from contrastive.vision.delta_file import save_delta
from contrastive.vision.load import load_vision_tower
from data.errors import exit_on_usage_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tower", help="a tower folder")
    parser.add_argument("base", help="the tower it was made from")
    parser.add_argument("file", help="what to write")
    args = parser.parse_args()
    with exit_on_usage_error():
        tower, base = load_vision_tower(args.tower), load_vision_tower(args.base)
        size = save_delta(tower, base, args.base, args.file)
        print(f"{args.file}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
