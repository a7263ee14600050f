"""Train the text tower against the locked image tower.

deepspeed launch/lit.py [RECIPE] [--flags]
deepspeed launch/lit.py --resume runs/NAME
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from contrastive import distributed
from contrastive.config import TrainConfig, check_resumable, load_config
from contrastive.recipes import build_recipe, default_data
from contrastive.train import train
from data.errors import UsageError, exit_on_usage_error


def parse(arguments: list[str]) -> tuple[TrainConfig, bool]:
    """(configuration, whether it resumes a run)."""
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
    asked = tyro.cli(TrainConfig, args=arguments, default=saved, prog="deepspeed launch/lit.py")
    if resume:
        check_resumable(saved, asked)
    return asked, bool(resume)


def main() -> None:
    distributed.init_from_launcher()
    with exit_on_usage_error():
        cfg, resume = parse(sys.argv[1:])
        if cfg.data.shards == build_recipe("demo").data.shards and distributed.is_main():
            from data.emoji import build_emoji

            build_emoji(default_data())
        distributed.barrier()
        folder = train(cfg, resume=resume)
        if distributed.is_main():
            print(f"model: {folder / 'model'}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
