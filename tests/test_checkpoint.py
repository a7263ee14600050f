"""Checkpoints: damaged ones are passed over by name, and one run at a time is in a folder."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_TOWER
from forked import Process
from forked import start as start_forked
from full_disk import small_files
from launcher import deepspeed_command

from contrastive.run.checkpoint import STATE, newest_checkpoint, own_step_counts
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.folder import steps_notice
from contrastive.run.lock import locked
from contrastive.run.stop import StopSignal
from contrastive.text.config import TextConfig
from contrastive.train import loop
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from data.errors import DataError, UsageError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_text: str, emoji_shards: Path) -> Path:
    """A run of 4 steps with a checkpoint at steps 2 and 4."""
    cfg = TrainConfig(
        name="run",
        out=str(tmp_path_factory.mktemp("trained")),
        data=DataConfig(shards=(f"{emoji_shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48,)),
        text=TextConfig(tower=tiny_text, context_length=12),
        optim=OptimConfig(lr=1e-3),
        zero=ZeroConfig(stage=1, micro_batch_size=8),
        global_batch_size=16,
        init_samples=0,
        steps=4,
        log_every=1,
        checkpoint_every=2,
    )
    return train(cfg)


def config_of(run: Path) -> TrainConfig:
    from contrastive.run.config_file import load_config

    return dataclasses.replace(load_config(run, TrainConfig), name=run.name, out=str(run.parent))


def copy_of(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def forget_sizes(run: Path) -> None:
    """As 0.1.0 wrote it."""
    for file in run.glob(f"checkpoints/*/{STATE}"):
        state = json.loads(file.read_text())
        del state["files"], state["blake2b"]
        file.write_text(json.dumps(state))


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "0.1.0"])
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *((STATE, harm) for harm in (empty, Path.unlink, cut)),
        *(("mp_rank_00_model_states.pt", harm) for harm in (empty, Path.unlink, cut, flip)),
        *(("*optim_states.pt", harm) for harm in (empty, Path.unlink, cut, flip)),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    harm: Callable[[Path], None], name: str, sizes: bool, trained: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    if not sizes:
        forget_sizes(run)
    assert newest_checkpoint(run / "checkpoints")[0].name == "step_00000004"  # type: ignore[index]
    (file,) = (run / "checkpoints/step_00000004").glob(name)
    harm(file)
    told: list[str] = []
    found, state = newest_checkpoint(run / "checkpoints", told.append)  # type: ignore[misc]
    assert found.name == "step_00000002"
    assert state["step"] == 2
    if file.exists() or name != STATE:  # without its state it was never complete
        (sentence,) = told
        assert "step_00000004 is damaged" in sentence
        assert file.name in sentence or "optim_states" in sentence or "model_states" in sentence


def test_a_flipped_bit_of_a_checkpoints_state_is_damage(trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    file = run / "checkpoints/step_00000004" / STATE
    data = file.read_bytes()
    whole = json.loads(data)
    for bit in range(0, 8 * len(data), 61):
        file.write_bytes(
            data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        )
        found, state = newest_checkpoint(run / "checkpoints")  # type: ignore[misc]
        if found.name == "step_00000004":  # the name of the digest itself
            assert all(state[name] == whole[name] for name in whole if name != "blake2b")


def test_a_run_goes_on_from_the_older_checkpoint_and_ends_as_if_nothing_had_been(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    empty(run / "checkpoints/step_00000004/mp_rank_00_model_states.pt")
    train(dataclasses.replace(config_of(run), keep_checkpoints=1), resume=True)
    said = capsys.readouterr().err
    assert "step_00000004 is damaged: mp_rank_00_model_states.pt has 0 bytes" in said
    assert "going on from step_00000002" in said
    assert (run / "model/model.safetensors").read_bytes() == (
        trained / "model/model.safetensors"
    ).read_bytes()
    assert [d.name for d in (run / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert newest_checkpoint(run / "checkpoints") is not None


def test_a_full_disk_at_a_checkpoint_is_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(trained, tmp_path)
    shutil.rmtree(run / "checkpoints/step_00000004")
    save = loop.save_checkpoint

    def save_on_a_full_disk(*arguments: Any) -> None:
        with small_files(20_000):
            save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_on_a_full_disk)
        words = r"checkpoint of step 4 cannot be .*full.*step_00000002 stays: make room and resume"
        with pytest.raises(DataError, match=words):
            train(config_of(run), resume=True)
    assert [f.name for f in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
    train(config_of(run), resume=True)
    assert newest_checkpoint(run / "checkpoints")[0].name == "step_00000004"  # type: ignore[index]


def test_without_a_good_checkpoint_one_sentence_names_all(trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    for file in run.glob("checkpoints/*/mp_rank_00_model_states.pt"):
        file.unlink()
    with pytest.raises(UsageError, match=r"no good .*00004 is damaged.*missing; .*00002 is damag"):
        train(config_of(run), resume=True)
    for file in run.glob(f"checkpoints/*/{STATE}"):
        empty(file)
    with pytest.raises(UsageError, match="holds a run of 4 steps"):
        train(config_of(run))


def test_a_count_of_steps_that_groups_share_becomes_one_of_each_on_its_device() -> None:
    """As it is after DeepSpeed has converted a checkpoint for another number of ranks."""
    parameters = [torch.nn.Parameter(torch.ones(2, device=name)) for name in ("cpu", "cpu", "meta")]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    shared = torch.tensor(3.0)
    for parameter in parameters:
        zeros = torch.zeros_like(parameter)
        optimizer.state[parameter] = {"step": shared, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    own_step_counts(optimizer)
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [step.device.type for step in steps] == ["cpu", "cpu", "meta"]
    for parameter in parameters[:2]:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [float(step) for step in steps[:2]] == [4.0, 4.0]


# ---- one program at a time ---------------------------------------------------------------------

PROGRAM = Path(__file__).parent / "stop_program.py"


def start(cfg: TrainConfig, ranks: int, resume: bool = False) -> Process | subprocess.Popen[str]:
    """A training with steps of half a second, in a process of its own or under the launcher."""
    job = Path(cfg.out) / "job.json"
    job.write_text(json.dumps({"config": dataclasses.asdict(cfg), "resume": resume}))
    if ranks == 1:
        return start_forked(PROGRAM, job, start_new_session=True)
    command = deepspeed_command(ranks, PROGRAM, str(job))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(what: Callable[[], object], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("loss") if file.exists() else 0


def long_run(trained: Path, tmp_path: Path, **changes: object) -> TrainConfig:
    cfg = dataclasses.replace(config_of(trained), name="long", out=str(tmp_path), steps=200)
    data = dataclasses.replace(cfg.data, num_workers=1)
    return dataclasses.replace(
        cfg,
        data=data,
        eval_every=1,
        checkpoint_every=0,
        **changes,  # type: ignore[arg-type]
    )


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def test_a_run_is_locked_and_stopped_by_a_signal_with_a_checkpoint(
    trained: Path, tmp_path: Path
) -> None:
    """One process: SIGTERM to it and to its loader workers, as the launcher sends it."""
    cfg = long_run(trained, tmp_path)
    running = start(cfg, 1)
    wait_for(lambda: lines(cfg.folder) >= 2)
    with pytest.raises(UsageError, match=rf"long is being written by process {running.pid} on "):
        train(cfg)
    os.killpg(running.pid, signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    newest = newest_checkpoint(cfg.folder / "checkpoints")
    assert newest is not None
    step = newest[1]["step"]
    sentence = f"stopped by SIGTERM after step {step} of 200, which is saved; go on with --resume "
    assert said.splitlines()[-1] == sentence + str(cfg.folder)

    train(dataclasses.replace(cfg, steps=step + 2), resume=True)
    whole = dataclasses.replace(cfg, name="whole")
    stop_at = [step]

    def stop(now: int, _: object) -> dict[str, float]:
        if now == stop_at[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt, match=f"stopped by SIGINT after step {step} of 200"):
        train(whole, [stop])
    train(dataclasses.replace(whole, steps=step + 2), resume=True)
    assert weights(whole.folder) == weights(cfg.folder)


SIGNALS = (signal.SIGTERM, signal.SIGKILL)
Launched = tuple[TrainConfig, Process | subprocess.Popen[str]]


@pytest.fixture(scope="module")
def launched(
    trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[signal.Signals, Launched]:
    """A long run under the launcher for each signal, side by side."""
    configs = {
        number: long_run(trained, tmp_path_factory.mktemp(number.name)) for number in SIGNALS
    }
    return {number: (cfg, start(cfg, 2)) for number, cfg in configs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_ranks_end_with_the_launcher_and_leave_a_checkpoint(
    number: signal.Signals, launched: dict[signal.Signals, Launched]
) -> None:
    cfg, running = launched[number]
    wait_for(lambda: lines(cfg.folder) >= 2)
    running.send_signal(number)  # `deepspeed` alone, whose death its children are not told of
    wait_for(lambda: newest_checkpoint(cfg.folder / "checkpoints"), 60)
    wait_for(lambda: is_free(cfg.folder), 60)
    _, said = running.communicate(timeout=60)
    assert "Traceback" not in said
    assert "stopped by SIGTERM after step" in said


def test_a_stopped_rank_lives_on_when_the_launcher_repeats_the_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it does once another rank has ended; this one has yet to say what was saved."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("RANK", "0")
    try:
        with suppress(KeyboardInterrupt), StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before[signal.SIGTERM])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    monkeypatch.delenv("RANK")
    with suppress(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]


def is_free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except UsageError:
        return False


# ---- other numbers of steps --------------------------------------------------------------------


def test_a_run_is_extended_and_is_told_what_differs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    train(dataclasses.replace(config_of(run), steps=6), resume=True)
    assert "steps 6, begun with 4: from here on the learning rate is" in capsys.readouterr().err
    assert config_of(run).steps == 6
    assert newest_checkpoint(run / "checkpoints")[1]["step"] == 6  # type: ignore[index]
    with pytest.raises(UsageError, match="steps 5: at least the 6 that the run has done"):
        train(dataclasses.replace(config_of(run), steps=5), resume=True)


def test_an_extension_before_the_cool_down_is_a_run_of_that_length(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(lr=1e-3, schedule="linear", cooldown_steps=2)
    cfg = dataclasses.replace(config_of(trained), out=str(tmp_path), optim=optim)
    short = dataclasses.replace(cfg, name="short", keep_checkpoints=9)
    train(short)
    shutil.rmtree(short.folder / "checkpoints/step_00000004")  # in which the rate had fallen
    assert "begun" in steps_notice(short, dataclasses.replace(short, steps=6), 4)
    train(dataclasses.replace(short, steps=6), resume=True)
    assert "begun" not in capsys.readouterr().err
    train(dataclasses.replace(cfg, name="whole", steps=6))
    assert weights(tmp_path / "short") == weights(tmp_path / "whole")
