"""The same functions on a GPU (`pytest -m gpu`)."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY_TOWER
from test_training import config, weights

from contrastive import LitModel, load_vision_tower
from contrastive.run.config import ZeroConfig
from contrastive.train.loop import train
from contrastive.train.micro_batch import find_micro_batch_size

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("patch_size", [48, 30, 8])
def test_a_tower_gives_the_same_on_both_devices(patch_size):
    tower = load_vision_tower(TINY_TOWER)
    images = torch.randn(4, 3, 240, 240)
    expected = tower(images, patch_size)
    got = tower.cuda()(images.cuda(), patch_size).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_the_chunk_that_is_found_fits(tiny_model):
    side = tiny_model.text.cuda().train()
    chunk = find_micro_batch_size(side, 1024, torch.bfloat16)
    assert 1024 % chunk == 0
    assert chunk > 64


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_training_in_bfloat16_goes_down(stage, cached, tiny_text, emoji_shards, tmp_path):
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, stage, steps=40, checkpoint_every=0)
    data = dataclasses.replace(cfg.data, features=str(tmp_path / "cache") if cached else "")
    vision = dataclasses.replace(cfg.vision, dtype="bfloat16")
    zero = ZeroConfig(stage=stage, precision="bfloat16", micro_batch_size=4)
    folder = train(dataclasses.replace(cfg, data=data, vision=vision, zero=zero))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < sum(losses[:10])
    model = LitModel.from_pretrained(folder / "model", device="cuda")
    assert model.encode_text(["a cat"]).is_cuda
    assert weights(folder)
