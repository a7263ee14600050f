"""Checkpoints: damaged ones are passed over by name, and one run at a time is in a folder."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_TOWER

from contrastive.run.checkpoint import STATE, newest_checkpoint
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from data.errors import UsageError


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
        del state["files"]
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
