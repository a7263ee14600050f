"""PI-resize and position grids: the properties the FlexiViT paper states for them."""

import pytest
import torch
import torch.nn.functional as F

from contrastive import resample_patch_embed
from contrastive.vision.resize import PositionResize, default_patch_sizes, resample_position_grid


def test_enlarging_patches_and_kernel_together_preserves_the_embedding():
    torch.manual_seed(0)
    weight = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    patches = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = torch.einsum("oihw,bihw->bo", weight, patches)
    for size in (8, 9, 12, 16, 31):
        resized = F.interpolate(patches, size=(size, size), mode="bilinear", align_corners=False)
        got = torch.einsum("oihw,bihw->bo", resample_patch_embed(weight, (size, size)), resized)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_shrinking_is_the_least_squares_kernel():
    """Equation 4 of the paper: no other kernel comes closer on average over white patches."""
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    best = resample_patch_embed(weight, (6, 6))
    impulses = torch.eye(144, dtype=torch.float64).view(144, 1, 12, 12)
    resized = F.interpolate(impulses, size=(6, 6), mode="bilinear", align_corners=False)

    def error(kernel: torch.Tensor) -> float:
        # E over white x of (<w, x> - <k, Bx>)^2 is the squared distance of w and B^T k
        back = torch.einsum("oihw,bihw->bo", kernel, resized).view(-1)
        return float((back - weight.view(-1)).square().sum())

    for _ in range(20):
        assert error(best) < error(best + 1e-3 * torch.randn_like(best))


def test_gradients_reach_the_stored_kernel():
    weight = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resample_patch_embed(w, (5, 5)), weight)


def test_kernels_need_not_be_square():
    assert resample_patch_embed(torch.randn(2, 3, 8, 6), (4, 9)).shape == (2, 3, 4, 9)
    with pytest.raises(ValueError, match="not positive"):
        resample_patch_embed(torch.randn(2, 3, 8, 6), (0, 9))


@pytest.mark.parametrize("rule", [PositionResize(), PositionResize("bicubic", antialias=False)])
def test_a_constant_position_grid_stays_constant(rule):
    grid = torch.full((1, 49, 4), 2.5)
    for rows, columns in ((5, 5), (3, 9), (7, 1), (1, 12)):
        resized = resample_position_grid(grid, (rows, columns), rule)
        torch.testing.assert_close(resized, torch.full((1, rows * columns, 4), 2.5))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_rows_and_columns_of_positions_are_resized_each_for_itself(mode, antialias):
    rule = PositionResize(mode, antialias)
    grid = torch.randn(1, 7, 7, 4, dtype=torch.float64)

    def resize(size: int) -> torch.Tensor:
        """(size, 7): what a column becomes, of a square, which torch resizes rightly."""
        impulses = torch.eye(7, dtype=torch.float64)[:, None, :, None].expand(-1, -1, -1, 7)
        found = F.interpolate(impulses, (size, 7), mode=mode, antialias=antialias)
        return found[:, 0, :, 0].T

    for rows, columns in ((3, 9), (9, 1), (1, 12), (7, 4), (2, 1), (1, 1)):
        expected = torch.einsum("ry,cx,byxd->brcd", resize(rows), resize(columns), grid)
        found = resample_position_grid(grid.flatten(1, 2), (rows, columns), rule)
        torch.testing.assert_close(found, expected.flatten(1, 2))


def test_default_patch_sizes_are_those_of_the_paper_at_240_px():
    assert default_patch_sizes(240) == (48, 40, 30, 24, 20, 16, 15, 12, 10, 8)
    assert default_patch_sizes(224) == (56, 32, 28, 16, 14, 8)
    assert 37 in default_patch_sizes(518, own=37)
