"""A training step's batches."""

import dataclasses

import pytest
import torch
from conftest import TINY_TOWER
from gradients import build_model, random_pairs, step_gradients

from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig
from data.errors import DataError


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_batch_without_a_good_sample_is_refused(kind, micro_batch_size, tiny_text):
    model = build_model(TINY_TOWER, tiny_text, LossConfig(kind=kind), torch.float64)
    batch, features = random_pairs(model, 8)
    batch = dataclasses.replace(batch, valid=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(DataError, match="step 0: not one sample of the batch could be read"):
        step_gradients(model, ZeroConfig(micro_batch_size=micro_batch_size), batch, features)
