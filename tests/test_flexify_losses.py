"""The losses of a student, against torch's own, and what shares of them add up to."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TOWER

from contrastive import load_vision_tower
from contrastive.flexify.config import DistillationConfig
from contrastive.flexify.losses import (
    DistillationLoss,
    Normaliser,
    Targets,
    class_shares,
    feature_distance,
    kl_loss,
    label_loss,
)
from data.errors import UsageError


def test_kl_is_zero_for_the_teacher_itself_and_torchs_value_else():
    ours, theirs = torch.randn(2, 5, 7)
    torch.testing.assert_close(kl_loss(theirs, theirs, 3.0), torch.zeros(5))
    expected = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl_loss(ours, theirs, 1.0), expected)


def test_a_high_temperature_keeps_the_gradients_size():
    """In the limit the gradient is the difference of centred logits over their number."""
    ours, theirs = torch.randn(2, 1, 6, dtype=torch.float64)
    ours.requires_grad_(True)
    (gradient,) = torch.autograd.grad(kl_loss(ours, theirs, 1000.0).sum(), ours)
    difference = ours.detach() - theirs
    torch.testing.assert_close(gradient, (difference - difference.mean()) / 6, rtol=1e-2, atol=1e-3)


def test_labels_of_one_class_give_torchs_losses():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    classes = class_shares(labels, 4)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(label_loss(logits, classes, "softmax"), expected)
    soft = 0.3 * classes + 0.7 * classes.flip(0)
    mixed = 0.3 * expected + 0.7 * F.cross_entropy(logits, labels.flip(0), reduction="none")
    torch.testing.assert_close(label_loss(logits, soft, "softmax"), mixed)
    sigmoid = -(F.logsigmoid(logits) * classes + F.logsigmoid(-logits) * (1 - classes)).sum(-1)
    torch.testing.assert_close(label_loss(logits, classes, "sigmoid"), sigmoid)
    assert class_shares(torch.tensor([-1]), 4).sum() == 0


def test_distances_are_of_standardised_features():
    """Scaling a dimension of both sides changes nothing."""
    ours, theirs = torch.randn(2, 64, 8)
    for distance in ("cosine", "mse"):
        values = []
        for scale in (torch.ones(8), torch.logspace(-2, 2, 8)):
            normaliser = Normaliser((theirs * scale).mean(0), (theirs * scale).std(0))
            pair = normaliser(ours * scale), normaliser(theirs * scale)
            values.append(feature_distance(*pair, distance))
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)


def test_shares_of_micro_batches_add_up_to_the_loss_of_the_batch():
    tower = load_vision_tower(TINY_TOWER)
    cfg = DistillationConfig(kl=1.0, features=2.0, labels=0.5)
    student = DistillationLoss(tower, cfg, Normaliser(torch.randn(32), torch.rand(32) + 0.5))
    weight = torch.tensor([1, 1, 0, 1, 1, 0]) / 4
    labelled = torch.tensor([1, 0, 0, 1, 1, 0]) / 3
    classes = class_shares(torch.tensor([3, -1, -1, 0, 9, 5]), 10)
    images, given = torch.randn(6, 3, 240, 240), torch.randn(6, 32)
    logits = torch.randn(6, 10)

    def loss(rows):
        targets = Targets(weight[rows], given[rows], logits[rows], classes[rows], labelled[rows])
        return student(images[rows], 60, 1.0, targets)

    whole = loss(slice(0, 6))
    torch.testing.assert_close(sum(loss(slice(i, i + 2)) for i in (0, 2, 4)), whole)
    good = [0, 1, 3, 4]
    features = tower(images[good], 60)
    expected = (
        2.0 * feature_distance(student.normaliser(features), given[good], "cosine").mean()
        + kl_loss(tower.net.head(features), logits[good], 1.0).mean()
        + 0.5
        * label_loss(tower.net.head(features)[[0, 2, 3]], classes[[0, 3, 4]], "softmax").mean()
    )
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"kl": -1.0}, "loss.kl -1.0: must be at least 0"),
        ({"temperature": 0.0}, "loss.temperature 0.0: must be above 0"),
        ({"normaliser_samples": 1}, "loss.normaliser_samples 1: at least 2"),
    ],
)
def test_impossible_losses_are_one_sentence(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        DistillationConfig(**values)
