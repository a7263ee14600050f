"""How the training programs read their command line: [RECIPE] [--flags], or --resume runs/NAME."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import tyro

from contrastive import distributed
from contrastive.recipes import choose_recipe
from contrastive.run.config_file import Config, check_resumable, load_config
from data.errors import UsageError


def parse_run(
    arguments: list[str],
    recipes: Mapping[str, Callable[[], Config]],
    default: str,
    program: str,
    what: str,
) -> tuple[Config, bool]:
    """(configuration, whether it resumes a run).

    recipes: what may be named; `default` when none is. program, what: for the help.
    """
    arguments = [part for a in arguments for part in _split_resume(a)]
    resume = ""
    if "--resume" in arguments:
        at = arguments.index("--resume")
        if at + 1 == len(arguments):
            raise UsageError(f"--resume needs the run's folder, e.g. --resume runs/{default}")
        resume = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    cfg = choose_recipe(recipe or default, recipes)
    if resume:
        if recipe:
            raise UsageError(f"--resume reads the configuration of {resume}; leave out {recipe!r}")
        folder = Path(resume)
        cfg = dataclasses.replace(
            load_config(folder, type(cfg)), name=folder.name, out=str(folder.parent)
        )
    asked = tyro.cli(
        type(cfg),
        args=arguments,
        default=cfg,
        prog=f"deepspeed {program} [RECIPE]",
        description=(
            f"{what} RECIPE: {', '.join(recipes)}; {default} when not given. --resume runs/NAME "
            "goes on from the newest checkpoint of a run."
        ),
        console_outputs=distributed.is_main(),
    )
    if resume:
        check_resumable(cfg, asked)
    return asked, bool(resume)


def _split_resume(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--resume=") else [argument]
