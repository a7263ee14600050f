"""Schedule and weight decay."""

import itertools

import pytest
import torch

from contrastive.optim import OptimConfig, build_optimizer, learning_rate


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
