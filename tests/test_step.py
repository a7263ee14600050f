"""A training step's batches."""

import dataclasses
from typing import Any

import pytest
import torch
from conftest import TINY_TOWER
from gradients import PlainEngine, build_model, random_pairs, step_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig
from contrastive.run.zero import batch_shape
from contrastive.text import packing
from contrastive.train import step
from contrastive.vision.config import Head
from data.errors import DataError


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_batch_without_a_good_sample_is_refused(kind, micro_batch_size, tiny_text):
    model = build_model(TINY_TOWER, tiny_text, LossConfig(kind=kind), torch.float64)
    batch, features = random_pairs(model, 8)
    batch = dataclasses.replace(batch, valid=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(DataError, match="step 0: not one sample of the batch could be read"):
        step_gradients(model, ZeroConfig(micro_batch_size=micro_batch_size), batch, features)


class Waits(TorchDispatchMode):
    """Notes what a processor waits for a GPU for: numbers that it reads, sizes it has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [part for part in args[1] if part is not None] if name == "index" else []
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2") or any(
            part.dtype == torch.bool for part in masks
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["none", "mlp"])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_step_of_packed_texts_waits_for_no_gpu(kind, head: Head, tiny_text, monkeypatch):
    """So that the kernels of its end are asked for before those of its beginning are done."""
    monkeypatch.setattr(packing, "attend_within", lambda q, k, v, *_: q + k + v)
    monkeypatch.setattr(step, "packs_texts", lambda *_: True)
    loss = LossConfig(kind=kind, positives="caption")
    model = build_model(TINY_TOWER, tiny_text, loss, torch.float64, head)
    batch, features = random_pairs(model, 16)
    trained = step.TrainStep(model, PlainEngine(model.trained, 4), batch_shape(16, 4, 1), seed=0)
    with Waits() as waits:
        trained(batch, features, batch.valid)
    assert waits.seen == []
    with Waits() as waits:  # as it does for a bad one
        trained(batch, features, batch.valid & (torch.arange(16) > 0))
    assert waits.seen
