"""Losses and gradients against open_clip's; identities behind tiles, micro-batches and ranks."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from contrastive.model import loss as module
from contrastive.model.loss import Positives, logsumexps, loss_share

B, D = 24, 16
LOSSES = ("sigmoid", "softmax")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    return images, texts, scale, bias


@pytest.fixture(params=["one tile", "tiles"], autouse=True)
def tile(request, monkeypatch):
    """All logits at once, and at most seven rows of images at a time, the last ones fewer."""
    if request.param == "tiles":
        monkeypatch.setitem(module.TILE, "cpu", 7 * B)


def loss_of_micro_batches(kind, images, texts, scale, bias, size, concepts=None):
    """Sum of the micro-batches' shares, as the trainer does it."""
    labels = torch.arange(B) if concepts is None else concepts
    parts = torch.arange(B).split(size)
    own = [logsumexps(images, texts[rows], scale) for rows in parts]
    over_texts = torch.stack([lse[0] for lse in own]).logsumexp(0)
    total = torch.zeros((), dtype=torch.float64)
    for rows, (_, over_images) in zip(parts, own, strict=True):
        positives, lse = Positives(labels, labels[rows]), (over_texts, over_images)
        total = total + loss_share(kind, images, texts[rows], positives, scale, bias, lse)
    return total


def gradients(loss, kind, texts, scale, bias):
    inputs = (texts, scale, bias)[: 3 if kind == "sigmoid" else 2]
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("size", [1, 5, B])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_equal_open_clip(kind, size, problem):
    images, texts, scale, bias = problem
    reference = SigLipLoss() if kind == "sigmoid" else ClipLoss()
    options = {"logit_bias": bias} if kind == "sigmoid" else {}
    expected = reference(images, texts, scale, **options)
    got = loss_of_micro_batches(kind, images, texts, scale, bias, size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    both = [gradients(loss, kind, texts, scale, bias) for loss in (got, expected)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", LOSSES)
def test_shared_captions_count_as_positives_in_any_micro_batches(kind, problem):
    images, texts, scale, bias = problem
    concepts = torch.arange(B) // 3
    whole = loss_of_micro_batches(kind, images, texts, scale, bias, B, concepts)
    parts = loss_of_micro_batches(kind, images, texts, scale, bias, 5, concepts)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    both = [gradients(loss, kind, texts, scale, bias) for loss in (parts, whole)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert not torch.isclose(whole, loss_of_micro_batches(kind, images, texts, scale, bias, B))


def test_shared_captions_count_as_their_definitions_say(problem):
    images, texts, scale, bias = problem
    concepts = torch.arange(B) // 3
    same = (concepts[:, None] == concepts).double()
    logits = scale * images @ texts.T
    targets = same / same.sum(0)
    expected = {
        "sigmoid": -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / B,
        "softmax": (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2,
    }
    for kind in LOSSES:
        got = loss_of_micro_batches(kind, images, texts, scale, bias, B, concepts)
        torch.testing.assert_close(got, expected[kind], rtol=1e-12, atol=0)
        both = [gradients(loss, kind, texts, scale, bias) for loss in (got, expected[kind])]
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [5, 2 * B])
@pytest.mark.parametrize("by_caption", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_several_texts_of_an_image_are_its_positives(kind, by_caption, size, problem):
    """Means over images and over texts of -log p of the positives, whose gradients with respect to
    images add up too; image i has one to three texts."""
    images, _, scale, bias = problem
    owners = torch.arange(B).repeat_interleave(torch.arange(B) % 3 + 1)
    texts = F.normalize(torch.randn(len(owners), D, dtype=torch.float64), dim=-1).requires_grad_()
    labels = torch.arange(B) // 2 if by_caption else torch.arange(B)
    same = (labels[:, None] == labels[owners]).double()
    images = images.clone().requires_grad_()
    logits = scale * images @ texts.T
    if kind == "sigmoid":
        expected = -F.logsigmoid((2 * same - 1) * (logits + bias)).sum(0).mean()
    else:
        of_images = (-logits.log_softmax(1) * same).sum(1) / same.sum(1)
        of_texts = (-logits.log_softmax(0) * same).sum(0) / same.sum(0)
        expected = (of_images.mean() + of_texts.mean()) / 2
    slopes = torch.zeros_like(images)
    counts, fixed = same.sum(1).long(), images.detach()
    over_texts = torch.logsumexp(logits, 1).detach()
    got = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(owners)).split(size):
        positives = Positives(labels, labels[owners[rows]], counts, len(owners))
        lse = over_texts, torch.logsumexp(logits[:, rows], 0).detach()
        got = got + loss_share(kind, fixed, texts[rows], positives, scale, bias, lse, slopes)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    both = [gradients(loss, kind, texts, scale, bias) for loss in (got, expected)]
    both[0] += (slopes,)
    both[1] += torch.autograd.grad(expected, images)
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", LOSSES)
def test_images_in_bfloat16_move_the_loss_by_their_rounding(kind, problem):
    """Sums stay in float32: a loss of 24 x 24 terms keeps three digits."""
    images, texts, scale, bias = (value.detach().float() for value in problem)
    pairs = Positives(torch.arange(B), torch.arange(B))
    texts.requires_grad_()
    shares = [
        loss_share(kind, images.to(dtype), texts, pairs, scale, bias)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert shares[1].dtype == torch.float32
    assert shares[1].item() == pytest.approx(shares[0].item(), rel=3e-3)
    exact, rounded = (torch.autograd.grad(share, texts)[0] for share in shares)
    assert (rounded - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("tile", ["of 64 images"], indirect=True)
@pytest.mark.parametrize("kind", LOSSES)
def test_no_more_than_a_tile_of_logits_is_in_memory(kind, tile, monkeypatch):
    """64 times the images take the memory of one tile, not of all logits."""
    monkeypatch.setitem(module.TILE, "cpu", 2**12)
    texts = F.normalize(torch.randn(64, D), dim=-1).requires_grad_()
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    images = F.normalize(torch.randn(2**12, D), dim=-1)
    pairs = Positives(torch.arange(2**12), torch.arange(64))
    with Largest():
        loss_share(kind, images, texts, pairs, scale, bias).backward()
    assert largest <= images.numel()  # the logits are four times as many
