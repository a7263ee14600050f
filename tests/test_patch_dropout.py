"""Dropping patches: which are read, how many, and that the tower reads just those."""

import pytest
import timm
import torch
from conftest import PARITY, TINY_TOWER

from contrastive import VisionTower, load_vision_tower
from contrastive.vision.config import PatchDropoutConfig
from contrastive.vision.patch_dropout import draw_kept, keep_rate_at, num_kept
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError


def test_a_tower_reads_only_the_patches_it_keeps():
    """Pixels of dropped patches change nothing, those of kept ones do; the class token stays."""
    tower = load_vision_tower(TINY_TOWER)
    images = torch.randn(2, 3, 240, 240)
    keep = torch.tensor([[0, 7, 24], [3, 4, 5]])  # of the 5 x 5 patches of 48 pixels
    before = tower(images, 48, keep)
    other = images.clone()
    other[0, :, :48, 48:] += 1  # patches 1 to 4 of the first image
    torch.testing.assert_close(tower(other, 48, keep)[0], before[0])
    other[0, :, 48:96, 96:144] += 1  # patch 7
    assert not torch.allclose(tower(other, 48, keep)[0], before[0])
    tokens = tower.embed_patches(images, 48)
    expected = torch.cat(
        [tokens[:, :1], tokens[:, 1:].gather(1, keep[..., None].expand(-1, -1, 32))], 1
    )
    torch.testing.assert_close(tower.embed_patches(images, 48, keep), expected)


@pytest.mark.parametrize(
    "tower", [TINY_TOWER, f"bigvision:{PARITY / 'bigvision_flexi_gap_p16_g15.npz'}"]
)
@pytest.mark.parametrize("patch_size", [48, 16])
def test_a_keep_rate_serves_at_any_patch_size(tower, patch_size):
    tower = load_vision_tower(tower)
    images = torch.randn(3, 3, 240, 240)
    half = tower(images, patch_size, 0.5)
    torch.testing.assert_close(tower(images[1:2], patch_size, 0.5)[0], half[1])  # alone as together
    assert torch.equal(tower(images, patch_size, 0.5), half)
    full = tower(images, patch_size)
    assert torch.equal(tower(images, patch_size, 1.0), full)
    assert not torch.allclose(half, full)
    prefix = tower.num_tokens(patch_size) - (240 // patch_size) ** 2
    kept = tower.embed_patches(images, patch_size, 0.5).shape[1] - prefix
    assert kept == num_kept(0.5, (240 // patch_size) ** 2)


def test_impossible_keep_rates_are_one_sentence():
    tower = load_vision_tower(TINY_TOWER)
    images = torch.randn(1, 3, 240, 240)
    for share in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(UsageError, match="allowed are shares above 0, up to 1"):
            tower(images, 48, share)
    net = timm.create_model("resnet10t", num_classes=0)
    convnet = VisionTower(net, TowerConfig("resnet10t", image_size=64)).lock()
    with pytest.raises(UsageError, match="cannot leave out patches; allowed: keep 1"):
        convnet(torch.randn(1, 3, 64, 64), 32, 0.5)
    with pytest.raises(UsageError, match=r"patch_dropout\.cycle_steps 1: at least 2"):
        PatchDropoutConfig(cycle_steps=1)


def test_the_draw_depends_on_seed_and_step_alone_and_differs_between_images():
    kept = draw_kept(0.4, 25, 64, seed=1, step=2)
    assert kept.shape == (64, 10)
    assert torch.equal(kept, draw_kept(0.4, 25, 64, seed=1, step=2))
    assert not torch.equal(kept, draw_kept(0.4, 25, 64, seed=1, step=3))
    assert not torch.equal(kept, draw_kept(0.4, 25, 64, seed=2, step=2))
    assert (kept.diff(dim=1) > 0).all()  # no patch twice
    assert kept.unique(dim=0).shape[0] > 60
    counts = torch.bincount(draw_kept(0.4, 25, 4000, seed=0, step=0).flatten(), minlength=25)
    assert (counts / 4000 - 0.4).abs().max() < 0.05  # each patch alike


def test_schedules_go_where_they_say():
    linear = PatchDropoutConfig(keep_rate=0.25, keep_rate_end=1.0, schedule="linear")
    assert [keep_rate_at(linear, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    cyclic = PatchDropoutConfig(keep_rate=1.0, keep_rate_end=0.5, schedule="cyclic", cycle_steps=4)
    assert [keep_rate_at(cyclic, s, 100) for s in range(6)] == [1.0, 0.75, 0.5, 0.75, 1.0, 0.75]
    assert keep_rate_at(PatchDropoutConfig(keep_rate=0.3), 50, 100) == 0.3
