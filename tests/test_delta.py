"""A tower kept as its difference from another one."""

import copy
import runpy
import sys

import pytest
import torch
from conftest import TINY_TOWER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from contrastive import load_vision_tower
from contrastive.vision.delta_file import apply_delta, save_delta
from contrastive.vision.formats.own_format import save_vision_tower
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


def test_the_program_writes_what_apply_delta_reads(towers, tmp_path, monkeypatch, capsys):
    _, tower = towers
    save_vision_tower(tower, tmp_path / "tower")
    file = tmp_path / "changed.safetensors"
    monkeypatch.setattr(sys, "argv", ["delta", str(tmp_path / "tower"), TINY_TOWER, str(file)])
    runpy.run_module("contrastive.vision.delta", run_name="__main__")
    assert capsys.readouterr().out == f"{file}: {file.stat().st_size / 1e6:.1f} MB\n"
    again = apply_delta(load_vision_tower(TINY_TOWER), file)
    torch.testing.assert_close(again.net.norm.bias, tower.net.norm.bias, rtol=0, atol=1e-4)


def test_files_of_something_else_are_refused(towers, tmp_path):
    base, tower = towers
    file = tmp_path / "changed.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is not a file of save_delta"):
        apply_delta(base, file)
    save_file({"norm.bias": torch.zeros(3)}, file)
    with pytest.raises(UsageError, match="is not a file of save_delta"):
        apply_delta(base, file)
    save_delta(tower, base, TINY_TOWER, file)
    with pytest.raises(UsageError, match="does not have"):
        apply_delta(load_vision_tower("dinov2s"), file)
    with pytest.raises(
        UsageError, match="was made from other weights; it can only be added to bigvision:"
    ):
        apply_delta(tower, file)
    save_file(load_file(file), file, {"format": "1", "base": "", "vision": vision_of(file)})
    with pytest.raises(UsageError, match="is not a file of save_delta: 'base_weights'"):
        apply_delta(base, file)
    with pytest.raises(UsageError, match="has other parameters than this tower"):
        save_delta(tower, load_vision_tower("dinov2s"), "dinov2s", file)


def vision_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()["vision"]


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_a_difference_that_float16_cannot_hold_is_refused(towers, tmp_path, value):
    base, tower = towers
    with torch.no_grad():
        tower.net.norm.bias[3] += value
    with pytest.raises(UsageError, match=r"norm\.bias differs by nan or by more than float16"):
        save_delta(tower, base, TINY_TOWER, tmp_path / "changed.safetensors")


def test_a_flipped_bit_is_noticed(towers, tmp_path):
    base, tower = towers
    save_delta(tower, base, TINY_TOWER, tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        (tmp_path / "d").write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        with pytest.raises(UsageError):
            apply_delta(base, tmp_path / "d")


def test_a_file_that_cannot_be_written_is_named(towers, tmp_path):
    base, tower = towers
    with pytest.raises(UsageError, match=r"no/changed\.safetensors cannot be written"):
        save_delta(tower, base, TINY_TOWER, tmp_path / "no" / "changed.safetensors")


def test_the_offline_default_is_dinov2s_but_for_its_difference():
    base, tower = load_vision_tower("dinov2s"), load_vision_tower("dinov2s-flexi")
    assert tower.patch_sizes == base.patch_sizes
    assert tower.transform == base.transform
    old, new = base.state_dict(), tower.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert 0 < len(changed) < len(old)
    assert tower.fingerprint != base.fingerprint
