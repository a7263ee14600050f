"""A tower kept as its difference from another one."""

import copy

import pytest
import torch
from conftest import TINY_TOWER
from safetensors.torch import load_file, save_file

from contrastive import load_vision_tower
from contrastive.delta import apply_delta, save_delta
from data.errors import UsageError


@pytest.fixture
def towers():
    base = load_vision_tower(TINY_TOWER)
    tower = copy.deepcopy(base)
    with torch.no_grad():
        tower.net.patch_embed.proj.weight += 0.01
        tower.net.norm.bias += 0.1
    return base, tower


def test_only_what_changed_is_kept_and_the_tower_comes_back(towers, tmp_path):
    base, tower = towers
    file = tmp_path / "changed.safetensors"
    size = save_delta(tower, base, TINY_TOWER, file)
    assert size == file.stat().st_size
    assert set(load_file(file)) == {"patch_embed.proj.weight", "norm.bias"}
    again = apply_delta(load_vision_tower(TINY_TOWER), file).lock()
    assert again.patch_sizes == tower.patch_sizes
    images = torch.randn(2, 3, 240, 240)
    for size in (48, 16):
        torch.testing.assert_close(again(images, size), tower(images, size), rtol=1e-4, atol=1e-4)


def test_files_of_something_else_are_refused(towers, tmp_path):
    base, tower = towers
    file = tmp_path / "changed.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no difference of towers"):
        apply_delta(base, file)
    save_file({"norm.bias": torch.zeros(3)}, file)
    with pytest.raises(UsageError, match="no difference of towers"):
        apply_delta(base, file)
    save_delta(tower, base, TINY_TOWER, file)
    with pytest.raises(UsageError, match="does not have"):
        apply_delta(load_vision_tower("dinov2s"), file)
    with pytest.raises(UsageError, match="other parameters"):
        save_delta(tower, load_vision_tower("dinov2s"), "dinov2s", file)


def test_the_offline_default_is_dinov2s_but_for_its_difference():
    base, tower = load_vision_tower("dinov2s"), load_vision_tower("dinov2s-flexi")
    assert tower.patch_sizes == base.patch_sizes
    assert tower.transform == base.transform
    old, new = base.state_dict(), tower.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert 0 < len(changed) < len(old)
    assert tower.fingerprint != base.fingerprint
