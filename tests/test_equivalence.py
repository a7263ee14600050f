"""Chunks, ranks and the cache change nothing: gradients at a large batch, losses of a whole run."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY_TOWER

from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.train.config import TrainConfig
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from lit_equivalence import (
    BOUNDS,
    LOSS_BOUND,
    LOSSES,
    STEPS,
    cases,
    chunked_gradients,
    largest_difference,
    losses_of,
    one_shot,
)
from lit_gradients import relative_error

pytestmark = pytest.mark.slow
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def chunked(tmp_path_factory, tiny_text) -> dict[int, dict[str, Gradients]]:
    """Ranks -> case -> gradients in chunks; ZeRO 2 reduces them over ranks after each chunk."""
    folder = tmp_path_factory.mktemp("equivalence")
    return {
        ranks: chunked_gradients(folder / f"{ranks}", ranks, TINY_TOWER, tiny_text, cases([0, 2]))
        for ranks in (1, 2)
    }


@pytest.fixture(scope="module")
def whole(tiny_text) -> dict[tuple[str, str], Gradients]:
    """(loss, dtype) -> gradients of the same batch in one forward, by open_clip's loss."""
    return {
        (loss, dtype): one_shot(TINY_TOWER, tiny_text, loss, dtype)
        for loss in LOSSES
        for dtype in BOUNDS
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", cases([0, 2]))
def test_gradients_in_chunks_equal_those_in_one_shot(case, ranks, chunked, whole):
    loss, dtype = cases([0, 2])[case]["loss"], cases([0, 2])[case]["dtype"]
    got, expected = chunked[ranks][case], whole[loss, dtype]
    assert relative_error(got, expected) <= BOUNDS[dtype]
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_cache_changes_no_loss(loss, tiny_text, emoji_shards, tmp_path):
    cfg = TrainConfig(
        name="pixels",
        out=str(tmp_path),
        data=DataConfig(shards=(f"{emoji_shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48, 30)),
        text=TextConfig(tower=tiny_text, context_length=12),
        loss=LossConfig(kind=loss),
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        zero=ZeroConfig(micro_batch_size=4),
        global_batch_size=8,
        init_samples=64,
        steps=STEPS,
        log_every=1,
    )
    data = dataclasses.replace(cfg.data, features=str(tmp_path / "features"))
    pixels = losses_of(cfg)
    cached = losses_of(dataclasses.replace(cfg, name="cached", data=data))
    assert len(pixels) == STEPS
    assert Path(data.features, "manifest.json").exists()
    assert largest_difference(cached, pixels) <= LOSS_BOUND
