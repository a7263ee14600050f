"""How the training programs read their command line: [RECIPE] [--flags], or --resume runs/NAME."""

import dataclasses
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from contrastive.launch_context import speaks
from contrastive.recipes import choose_recipe
from contrastive.run.config import RunConfig
from contrastive.run.config_file import RENAMED, Config, from_dict, load_config
from contrastive.run.resume import check_resumable
from data.errors import UsageError

# Flags that few runs change: always accepted, shown by --help-all only.
RARE = {
    "keep_checkpoints", "deepspeed_config", "init_samples", "val_samples",
    "data.on_error", "data.allow_pipe", "data.block_shards", "data.max_pixels", "data.index_dir",
    "optim.min_lr", "optim.cooldown_steps", "optim.head_weight_decay", "optim.beta1",
    "optim.beta2", "optim.eps", "optim.clip_norm", "zero.offload",
    "vision.patch_weights", "vision.fit", "student.patch_weights", "student.max_aspect",
    "loss.temperature_init", "loss.bias_init",
    "data.captions_per_image", "vision.head",
    "text.frozen", "text.head", "text.trainable", "text.decay_to_start",
    "text.lora",
    "loss.temperature", "loss.label_loss", "loss.normaliser_samples",
    "patch_dropout.keep_rate_end", "patch_dropout.schedule", "patch_dropout.cycle_steps",
}  # fmt: skip


def parse_run(
    arguments: list[str],
    recipes: Mapping[str, Callable[[], Config]],
    default: str,
    program: str,
    what: str,
) -> tuple[Config, bool]:
    """Parse a training program's command line: (configuration, whether it resumes a run).

    recipes: configurations by name; `default` is used when none is named. program, what: for the
    help.
    """
    arguments = [part for argument in arguments for part in _modern(argument)]
    resume = ""
    if "--resume" in arguments:
        at = arguments.index("--resume")
        if at + 1 == len(arguments):
            raise UsageError(f"resume needs the run's folder, e.g. resume=runs/{default}")
        resume = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    cfg = choose_recipe(recipe or default, recipes)
    if resume:
        if recipe:
            raise UsageError(f"resume reads the configuration of {resume}; leave out {recipe!r}")
        folder = Path(resume)
        cfg = dataclasses.replace(
            load_config(folder, type(cfg)), name=folder.name, out=str(folder.parent)
        )

    def parse(typed: list[str], hidden: Collection[str] = ()) -> Config:
        unchecked = _unchecked(cfg, hidden)
        asked = tyro.cli(
            type(unchecked),
            args=typed,
            default=unchecked,
            prog=f"deepspeed {program} [RECIPE]",
            description=(
                f"{what} RECIPE: {', '.join(recipes)}; {default} when not given. --resume "
                "runs/NAME goes on from the newest checkpoint of a run."
            ),
            console_outputs=speaks(),
        )
        values = dataclasses.asdict(asked)
        if not resume:
            _shorten_warmup(values, cfg, typed)
        return from_dict(type(cfg), values)

    if "--help-all" in arguments:
        parse(["--help"])
    if not {"-h", "--help"}.isdisjoint(arguments):
        try:
            parse(["--help"], hidden=RARE)
        finally:
            if speaks():
                print("Flags that few runs need: --help-all.")
    asked = parse(arguments)
    if resume:
        check_resumable(cfg, asked)
    return asked, bool(resume)


def _modern(argument: str) -> list[str]:
    """An argument under today's names; --resume=FOLDER becomes two arguments."""
    if argument.startswith("--resume="):
        return argument.split("=", 1)
    flag, equals, value = argument.partition("=")
    old = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--") or old not in RENAMED:
        return [argument]
    new = "--" + RENAMED[old].replace("_", "-")
    if speaks():
        print(f"{flag} is called {new} now; the old name works in this release", file=sys.stderr)
    return [new + equals + value]


def _shorten_warmup(values: dict[str, Any], recipe: RunConfig, typed: list[str]) -> None:
    """Where fewer steps were typed than the recipe warms up for, its share of the steps is kept."""
    optim, steps, warmup = values["optim"], values["steps"], recipe.optim.warmup_steps
    told = any(flag.replace("_", "-").startswith("--optim.warmup-steps") for flag in typed)
    if told or not 1 <= steps < warmup:
        return
    optim["warmup_steps"] = steps * warmup // recipe.steps
    if speaks():
        print(
            f"--optim.warmup-steps {optim['warmup_steps']} of {steps} steps, where the recipe has "
            f"{warmup} of {recipe.steps}",
            file=sys.stderr,
        )


def _unchecked(cfg: Any, hidden: Collection[str]) -> Any:
    """The same values in dataclasses that check nothing; help leaves out the `hidden` fields.

    tyro would print a failed check in its own words; `parse_run` checks afterwards instead.
    """
    hints = typing.get_type_hints(type(cfg), include_extras=True)
    values: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            group = f.name + "."
            value = _unchecked(value, [n[len(group) :] for n in hidden if n.startswith(group)])
            types[f.name] = type(value)
        elif f.name in hidden:
            types[f.name] = Annotated[hints[f.name], tyro.conf.Suppress]
        values[f.name] = value
    own: dict[str, Any] = {
        "__annotations__": types,
        "__doc__": cfg.__doc__,
        "__module__": cfg.__module__,
    }
    own["__post_init__"] = lambda _: None
    twin: Any = type(type(cfg).__name__, (type(cfg),), own)
    return dataclasses.dataclass(frozen=True, kw_only=True)(twin)(**values)
