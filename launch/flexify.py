"""Make a fixed-patch ViT flexible, by distillation or with labels.

deepspeed launch/flexify.py [RECIPE] [--flags]      # recipes: dinov2s (the default), clip, imagenet
deepspeed launch/flexify.py --resume runs/NAME      # go on from the newest checkpoint
"""

from contrastive.cli import parse_run
from contrastive.flexify.config import FlexifyConfig
from contrastive.launch_context import take_arguments
from contrastive.recipes import FLEXIFY_RECIPES, default_data
from contrastive.vision.config import check_tower_spec
from data.errors import exit_on_usage_error


def main() -> None:
    with exit_on_usage_error(FlexifyConfig, "resume"):
        what = "Make a fixed-patch ViT flexible, by distillation or with labels."
        cfg, resume = parse_run(
            take_arguments(), FLEXIFY_RECIPES, "dinov2s", "launch/flexify.py", what
        )
        for tower in filter(None, (cfg.teacher.tower, cfg.student.tower)):
            check_tower_spec(tower)
        from data.shards.names import expand_shards

        drawings = cfg.data.shards == FLEXIFY_RECIPES["dinov2s"]().data.shards  # built if missing
        if not drawings:
            for shards in filter(None, (cfg.data.shards, cfg.val_shards)):
                expand_shards(shards, cfg.data.allow_pipe)

        from contrastive import distributed
        from contrastive.flexify.loop import flexify

        with distributed.launched():
            if drawings and distributed.is_main():
                from data.emoji.build import build_emoji

                build_emoji(default_data())
            distributed.barrier(patient=True)
            folder = flexify(cfg, resume=resume)
            if distributed.is_main():
                print(f"tower: {folder / 'model'}")


if __name__ == "__main__":
    main()
