"""Losses and gradients against open_clip's; identities behind micro-batches and ranks."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from contrastive.model.loss import pair_targets, partial_lse, sigmoid_loss, softmax_loss

B, D = 24, 16


@pytest.fixture
def problem():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    return images, texts, scale, bias


def loss_of_micro_batches(kind, images, texts, scale, bias, size, concepts=None):
    """Sum of the micro-batches' shares, as the trainer does it."""
    parts = torch.arange(B).split(size)
    lse = torch.stack([partial_lse(images, texts[p], scale) for p in parts]).logsumexp(0).detach()
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        targets = pair_targets(B, rows, concepts, torch.float64)
        if kind == "sigmoid":
            total = total + sigmoid_loss(images, texts[rows], targets, scale, bias)
        else:
            total = total + softmax_loss(images, texts[rows], targets, scale, lambda _: lse)
    return total


@pytest.mark.parametrize("size", [1, 5, B])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_loss_and_gradients_equal_open_clip(kind, size, problem):
    images, texts, scale, bias = problem
    inputs = (texts, scale, bias) if kind == "sigmoid" else (texts, scale)
    reference = SigLipLoss() if kind == "sigmoid" else ClipLoss()
    options = {"logit_bias": bias} if kind == "sigmoid" else {}
    expected = reference(images, texts, scale, **options)
    expected_grads = torch.autograd.grad(expected, inputs)
    got = loss_of_micro_batches(kind, images, texts, scale, bias, size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_shared_captions_count_as_positives_in_any_micro_batches(kind, problem):
    images, texts, scale, bias = problem
    concepts = torch.arange(B) // 3
    whole = loss_of_micro_batches(kind, images, texts, scale, bias, B, concepts)
    parts = loss_of_micro_batches(kind, images, texts, scale, bias, 5, concepts)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    (a,), (b,) = (torch.autograd.grad(x, [texts]) for x in (whole, parts))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert not torch.isclose(whole, loss_of_micro_batches(kind, images, texts, scale, bias, B))


def test_softmax_with_shared_captions_is_cross_entropy_against_the_targets(problem):
    images, texts, scale, bias = problem
    concepts = torch.arange(B) // 3
    targets = pair_targets(B, torch.arange(B), concepts, torch.float64)
    logits = scale * images @ texts.T
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2
    got = loss_of_micro_batches("softmax", images, texts, scale, bias, B, concepts)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_targets_of_pairs_and_of_shared_captions():
    assert pair_targets(3, torch.tensor([2, 0])).tolist() == [[0, 1], [0, 0], [1, 0]]
    shared = pair_targets(3, torch.tensor([0, 1]), torch.tensor([5, 6, 5]))
    assert shared.tolist() == [[0.5, 0], [0, 1], [0.5, 0]]
