"""Train the text tower against the locked image tower.

deepspeed launch/lit.py [RECIPE] [--flags]      # recipes: demo (the default), cc12m
deepspeed launch/lit.py --resume runs/NAME      # go on from the newest checkpoint
"""

import sys

from contrastive import LitModel, distributed
from contrastive.cli import parse_run
from contrastive.config import TrainConfig
from contrastive.recipes import RECIPES, build_recipe, default_data
from contrastive.train import Callback, train
from data.errors import exit_on_usage_error
from retrieval import evaluate, load_dataset


def evaluators(cfg: TrainConfig) -> list[Callback]:
    """Zero-shot accuracy on every folder of --eval-data, at the coarsest patch size trained."""

    def evaluator(root: str) -> Callback:
        dataset = load_dataset("shards", root)

        def run(step: int, model: LitModel) -> dict[str, float]:
            size = max(cfg.vision.patch_sizes or model.patch_sizes)
            result = evaluate(model, dataset, [size], num_workers=cfg.data.num_workers)
            return {
                f"{dataset.name}/p{size}/top{k}": accuracy.value
                for k, accuracy in result.accuracy[size].items()
            }

        return run

    return [evaluator(root) for root in cfg.eval_data]


def main() -> None:
    distributed.init_from_launcher()
    with exit_on_usage_error():
        what = "Train the text tower against the locked image tower."
        cfg, resume = parse_run(sys.argv[1:], RECIPES, "demo", "launch/lit.py", what)
        if cfg.data.shards == build_recipe("demo").data.shards and distributed.is_main():
            from data.emoji import build_emoji

            build_emoji(default_data())
        distributed.barrier()
        folder = train(cfg, evaluators(cfg), resume=resume)
        if distributed.is_main():
            print(f"model: {folder / 'model'}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
