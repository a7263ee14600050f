"""Make a fixed-patch ViT flexible, by distillation or with labels.

deepspeed launch/flexify.py [RECIPE] [--flags]      # recipes: dinov2s (the default), imagenet
deepspeed launch/flexify.py --resume runs/NAME      # go on from the newest checkpoint
"""

import sys

from contrastive import distributed
from contrastive.cli import parse_run
from contrastive.flexify.loop import flexify
from contrastive.recipes import FLEXIFY_RECIPES, default_data
from data.errors import exit_on_usage_error


def main() -> None:
    distributed.init_from_launcher()
    with exit_on_usage_error():
        what = "Make a fixed-patch ViT flexible, by distillation or with labels."
        cfg, resume = parse_run(sys.argv[1:], FLEXIFY_RECIPES, "dinov2s", "launch/flexify.py", what)
        if cfg.data.shards == FLEXIFY_RECIPES["dinov2s"]().data.shards and distributed.is_main():
            from data.emoji.build import build_emoji

            build_emoji(default_data())
        distributed.barrier()
        folder = flexify(cfg, resume=resume)
        if distributed.is_main():
            print(f"tower: {folder / 'model'}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
