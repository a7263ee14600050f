"""Random shapes in flexify: which rectangle a step looks at, and at which grids."""

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER

from contrastive import load_vision_tower
from contrastive.flexify.windows import cut_for, draw_window, loaded_side, resize_images


def test_windows_lie_in_the_image_and_are_uniform_in_the_logarithm_of_their_aspect():
    windows = [draw_window(3.0, 416, 7, step) for step in range(400)]
    assert windows == [draw_window(3.0, 416, 7, step) for step in range(400)]
    assert all(w.top >= 0 and w.top + w.height <= 416 for w in windows)
    assert all(w.left >= 0 and w.left + w.width <= 416 for w in windows)
    assert all(max(w.height, w.width) == 416 for w in windows)
    logs = np.log([w.height / w.width for w in windows]) / np.log(3)
    assert np.abs(logs).max() <= 1 + 1e-2
    shares = np.histogram(logs, 4, (-1.01, 1.01))[0] / len(logs)
    assert shares == pytest.approx([0.25] * 4, abs=0.07)
    assert {w.top == 0 for w in windows if w.height < 300} == {False}  # anywhere, not at the edge


def test_without_an_aspect_the_window_is_the_image_itself():
    images = torch.rand(2, 3, 96, 96)
    assert torch.equal(draw_window(1.0, 96, 0, 5)(images), images)
    assert loaded_side(96, 1.0) == 96


@pytest.mark.parametrize("shape", [(96, 300), (300, 96), (250, 300)])
def test_a_rectangle_is_read_at_the_patches_and_the_pixels_of_a_square(shape):
    tower = load_vision_tower(TINY_TOWER)
    for size in (60, 48, 40, 24):
        budget = (tower.image_size // size) ** 2
        for any_patch in (True, False):
            cut = cut_for(tower, size, shape, any_patch=any_patch)
            rows, columns = cut.height // cut.patch_size, cut.width // cut.patch_size
            assert (cut.height, cut.width) == (rows * cut.patch_size, columns * cut.patch_size)
            assert 0.6 * budget <= rows * columns <= budget
            assert cut.patch_size == size or any_patch
            assert cut.height * cut.width <= tower.image_size**2
            pixels = resize_images(torch.rand(1, 3, *shape), (cut.height, cut.width))
            assert tower(pixels, cut.patch_size).shape == (1, tower.embed_dim)
        square = cut_for(tower, size, (300, 300), any_patch=True)
        assert square == (tower.image_size, tower.image_size, size)
