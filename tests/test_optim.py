"""Schedule and weight decay."""

import itertools

import pytest
import torch

from contrastive.run.config import OptimConfig
from contrastive.run.optim import build_optimizer, learning_rate
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.vision.build import build_vision_tower
from data.errors import UsageError


def test_schedule_warms_up_linearly_then_follows_a_cosine():
    cfg = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(cfg, step, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)  # half way down
    assert rates[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_weight_decay_spares_norms_biases_and_the_temperature(tiny_model):
    optimizer = build_optimizer(OptimConfig(weight_decay=0.5), tiny_model.text)
    spared = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    for name, parameter in tiny_model.text.named_parameters():
        plain = parameter.ndim < 2 or name.endswith("bias")
        assert (id(parameter) in spared) == plain, name
        if "logit" in name or "LayerNorm" in name:
            assert id(parameter) in spared


def test_the_image_tower_is_never_in_the_optimiser(tiny_model):
    optimizer = build_optimizer(OptimConfig(), tiny_model.text)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not held & {id(p) for p in tiny_model.vision.parameters()}


def test_frozen_parameters_are_left_out():
    layer = torch.nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    groups = build_optimizer(OptimConfig(), layer).param_groups
    assert sum(len(g["params"]) for g in groups) == 1


def test_a_linear_schedule_holds_and_then_cools_down():
    cfg = OptimConfig(lr=1.0, min_lr=0.2, schedule="linear", warmup_steps=2, cooldown_steps=4)
    rates = [learning_rate(cfg, step, 10) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    whole = OptimConfig(lr=1.0, schedule="linear", warmup_steps=2)
    assert [learning_rate(whole, step, 6) for step in (2, 3, 4, 6)] == [1, 0.75, 0.5, 0]


def test_the_head_may_have_a_decay_of_its_own(tiny_model):
    cfg = OptimConfig(weight_decay=0.1, head_weight_decay=3.0)
    for module, head in (
        (tiny_model.text, tiny_model.text.encoder.projection),
        (build_vision_tower(tiny_model.vision.config), None),
    ):
        weight = (head or module.net.head).weight
        groups = build_optimizer(cfg, module).param_groups
        decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert decay[id(weight)] == 3.0
        others = [p for p in module.parameters() if p.ndim >= 2 and p is not weight]
        assert {decay[id(p)] for p in others} <= {0.1, 0.0}
        assert len(decay) == sum(len(g["params"]) for g in groups) == len(list(module.parameters()))
    with pytest.raises(UsageError, match=r"optim\.head_weight_decay -1\.0: must be at least 0"):
        OptimConfig(head_weight_decay=-1.0)


def test_adafactor_trains_with_rows_and_columns_for_a_matrix():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    optimizer = build_optimizer(OptimConfig(name="adafactor", lr=0.05), layer)
    inputs, target = torch.randn(128, 64), torch.randn(128, 32)
    losses = []
    for _ in range(30):
        loss = (layer(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    kept = sum(v.numel() for v in optimizer.state[layer.weight].values() if v.ndim)
    assert kept == 64 + 32


def test_a_pretrained_layer_called_head_is_not_the_head(tiny_text):
    encoder = TextEncoder(load_text_tower(TextConfig(tiny_text)), 8)
    encoder.tower.head = torch.nn.Linear(4, 4)
    groups = build_optimizer(OptimConfig(head_weight_decay=3.0), encoder).param_groups
    (decayed,) = (g["params"] for g in groups if g["weight_decay"] == 3.0)
    assert [p is encoder.projection.weight for p in decayed] == [True]
