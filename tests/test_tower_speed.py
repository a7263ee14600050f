"""Speeds by patch size follow what a device computes, not how often it is asked."""

import pytest
import torch
from torch import Tensor

from contrastive.image_features import CPU_IMAGES, FULL_IMAGES, FULL_TOKENS, full_batch
from retrieval import tower_speed
from retrieval.tower_speed import time_forwards

TOKENS = {48: 26, 24: 101, 16: 226, 8: 901}
LAUNCH_S = 5e-3  # Python's part of a forward, at any size
TOKEN_S = 1e-6  # the device's part, a token
CPU = torch.device("cpu")


class Device:
    """A clock of its own, and a forward that Python launches and a device computes meanwhile."""

    def __init__(self, room: int = 10_000) -> None:
        self.now, self.room, self.batches = 0.0, room, []  # type: ignore[var-annotated]

    def forward(self, pixels: Tensor, patch_size: int) -> Tensor:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError
        self.batches.append((patch_size, len(pixels)))
        self.now += max(LAUNCH_S, len(pixels) * TOKENS[patch_size] * TOKEN_S)
        return pixels


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(tower_speed.time, "perf_counter", lambda: device.now)
    return device


def full_batches() -> dict[int, int]:
    cuda = torch.device("cuda")
    return {size: full_batch(tokens, cuda) for size, tokens in TOKENS.items()}


def test_a_full_device_is_as_fast_as_it_has_tokens_to_compute(device: Device) -> None:
    seconds = time_forwards(device.forward, 1, CPU, full_batches(), 3, spell_s=0.05)
    for size, tokens in TOKENS.items():
        assert seconds[size] == pytest.approx([tokens * TOKEN_S] * 3)
    alone = time_forwards(device.forward, 1, CPU, dict.fromkeys(TOKENS, 1), 1)
    assert alone[48] == pytest.approx(alone[16])  # what Python takes for a launch


def test_batches_fill_a_gpu_and_leave_it_room() -> None:
    for tokens in (1, 17, 257, 10_000):
        images = full_batch(tokens, torch.device("cuda"))
        least, most = FULL_IMAGES
        assert least <= images <= most
        if least < images < most:
            assert FULL_TOKENS - tokens < images * tokens <= FULL_TOKENS
        assert full_batch(tokens, CPU) == CPU_IMAGES


def test_patch_sizes_take_turns_after_a_warm_up(device: Device) -> None:
    told: list[int] = []
    time_forwards(device.forward, 1, CPU, {48: 2, 8: 2}, 2, spell_s=1e-9, told=told.append)
    assert told == [48, 8, 48, 8]
    assert [size for size, _ in device.batches] == [48, 8, 48, 8, 48, 8]


def test_a_batch_without_room_is_halved(device: Device) -> None:
    device.room = 100
    seconds = time_forwards(device.forward, 1, CPU, {16: 256}, 1, spell_s=1e-9)
    assert {images for _, images in device.batches} == {64}
    assert seconds[16] == pytest.approx([226 * TOKEN_S])
    device.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        time_forwards(device.forward, 1, CPU, {16: 4}, 1, spell_s=1e-9)
