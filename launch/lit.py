"""Train the text tower against the locked image tower.

deepspeed launch/lit.py [RECIPE] [--flags]      # recipes: demo (the default), cc12m
deepspeed launch/lit.py --resume runs/NAME      # go on from the newest checkpoint
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from contrastive import LitModel, distributed
from contrastive.config import TrainConfig, check_resumable, load_config
from contrastive.recipes import RECIPES, build_recipe, default_data
from contrastive.train import Callback, train
from data.errors import UsageError, exit_on_usage_error
from retrieval import evaluate, load_dataset


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """(configuration, whether it resumes a run)."""
    arguments = [part for a in arguments for part in _split_resume(a)]
    resume = ""
    if "--resume" in arguments:
        at = arguments.index("--resume")
        if at + 1 == len(arguments):
            raise UsageError("--resume needs the run's folder, e.g. --resume runs/demo")
        resume = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    if resume:
        if recipe:
            raise UsageError(f"--resume reads the configuration of {resume}; leave out {recipe!r}")
        folder = Path(resume)
        saved = dataclasses.replace(load_config(folder), name=folder.name, out=str(folder.parent))
    else:
        saved = build_recipe(recipe or "demo")
    asked = tyro.cli(
        TrainConfig,
        args=arguments,
        default=saved,
        prog="deepspeed launch/lit.py [RECIPE]",
        description=(
            "Train the text tower against the locked image tower. RECIPE: "
            f"{', '.join(RECIPES)}; demo when not given. --resume runs/NAME goes on from the "
            "newest checkpoint of a run."
        ),
        console_outputs=distributed.is_main(),
    )
    if resume:
        check_resumable(saved, asked)
    return asked, bool(resume)


def _split_resume(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--resume=") else [argument]


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
        cfg, resume = parse(sys.argv[1:])
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
