"""Train the text tower against the locked image tower.

deepspeed launch/lit.py [RECIPE] [--flags]      # recipes: demo (the default), demo-large, cc12m
deepspeed launch/lit.py --resume runs/NAME      # go on from the newest checkpoint
"""

from typing import TYPE_CHECKING

from contrastive.cli import parse_run
from contrastive.launch_context import take_arguments
from contrastive.recipes import RECIPES, default_data
from contrastive.train.config import TrainConfig
from contrastive.vision.config import check_tower_spec
from data.errors import UsageError, exit_on_usage_error

if TYPE_CHECKING:
    from contrastive import LitModel
    from contrastive.train.loop import Callback


def evaluators(cfg: TrainConfig) -> "list[Callback]":
    """An evaluation of each data set of `eval_data`, on all ranks, at `eval_patch_sizes`."""
    from contrastive import load_vision_tower
    from retrieval import evaluate
    from retrieval.evaluation.datasets import EvalDataset, load_named, tell_apart

    if cfg.eval_patch_sizes:  # refused now, and not after the first eval_every steps
        tower = load_vision_tower(cfg.vision.tower)
        for size in cfg.eval_patch_sizes:
            tower.check_patch_size(size)

    def evaluator(dataset: EvalDataset) -> "Callback":
        def run(step: int, model: "LitModel") -> dict[str, float]:
            coarsest = max(cfg.vision.patch_sizes or model.patch_sizes)
            sizes = cfg.eval_patch_sizes or (coarsest,)
            return evaluate(model, dataset, sizes, num_workers=cfg.data.num_workers).figures()

        return run

    datasets = [load_named(text) for text in cfg.eval_data]
    roots = [text.rpartition(":")[2] for text in cfg.eval_data]
    return [evaluator(dataset) for dataset in tell_apart(datasets, roots)]


def main() -> None:
    with exit_on_usage_error(TrainConfig, "resume"):
        what = "Train the text tower against the locked image tower."
        cfg, resume = parse_run(take_arguments(), RECIPES, "demo", "launch/lit.py", what)
        if cfg.eval_every and not cfg.eval_data and not resume:
            raise UsageError(
                f"eval_every {cfg.eval_every}: name by eval_data what is to be evaluated on"
            )
        check_tower_spec(cfg.vision.tower)
        from data.shards.names import check_told_apart, expand_shards

        drawings = cfg.data.shards == RECIPES["demo"]().data.shards  # built where missing
        if not drawings:
            shards = expand_shards(cfg.data.shards, cfg.data.allow_pipe)
            if cfg.data.features:
                check_told_apart(shards)

        from contrastive import distributed
        from contrastive.train.loop import train

        with distributed.launched():
            if drawings and distributed.is_main():
                from data.emoji.build import build_emoji

                build_emoji(default_data())
            distributed.barrier(patient=True)
            folder = train(cfg, evaluators(cfg), resume=resume)
            if distributed.is_main():
                print(f"model: {folder / 'model'}")


if __name__ == "__main__":
    main()
