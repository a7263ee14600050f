"""The same functions on a GPU (`pytest -m gpu`)."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY_TOWER
from gradients import build_model, random_pairs, step_gradients
from test_training import config, weights

from contrastive import LitModel, distributed, load_vision_tower
from contrastive.model.config import LossConfig
from contrastive.run.checkpoint import own_step_counts
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


def test_a_step_fits_the_memory_that_its_micro_batch_was_found_for(tiny_text, monkeypatch):
    """A GPU with 256 MiB left: the batch does not fit at once, and its micro-batches do."""
    distributed.ensure_group()
    model = build_model(TINY_TOWER, tiny_text, LossConfig(), torch.float32).cuda()
    model.text.train()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**28, 2**28))
        size = find_micro_batch_size(model, 8192, torch.bfloat16)
    assert 32 <= size < 8192
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    zero = ZeroConfig(precision="bfloat16", micro_batch_size=size)
    found = step_gradients(model, zero, *random_pairs(model, 8192))
    assert torch.cuda.max_memory_allocated() - before <= 2**28
    assert found["loss"].isfinite()


def test_adamw_goes_on_from_a_count_of_steps_that_was_converted():
    """DeepSpeed's conversion for another number of ranks leaves it on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0, fused=True)
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    own_step_counts(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach().cpu(), torch.full((4,), 0.5))
    assert optimizer.state[parameter]["step"].item() == 1


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_training_in_bfloat16_goes_down(stage, cached, tiny_text, emoji_shards, tmp_path):
    """From random features and projection: what is solved in closed form leaves little to train."""
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, stage, steps=40, checkpoint_every=0)
    cfg = dataclasses.replace(cfg, init_samples=0)
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
