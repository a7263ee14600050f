"""Images that are not square: what towers make of them, and the same of timm's networks."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.naflexvit import checkpoint_filter_fn
from torch import Tensor

from contrastive.vision.build import build_vision_tower
from contrastive.vision.flexible_families import cut_patches
from contrastive.vision.resize import PositionResize, resample_patch_embed
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError

SIZES = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAFLEX = {name: value for name, value in SIZES.items() if name != "img_size"} | {
    "pos_embed_grid_size": (4, 4)
}
SHAPES = ((64, 64), (32, 80), (16, 112), (48, 64))
"""Heights and widths: the stored grid, flat, one row, and one side that is stored."""
TIMM = PositionResize("bicubic", antialias=True)  # how timm resizes positions as it runs


def spread(net: torch.nn.Module) -> Any:
    """Weights so large that a wrong position is seen."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                one = "pos_embed" in name or "token" in name
                parameter.normal_(std=1.0 if one else parameter[0].numel() ** -0.5)
    return net.eval()


def tower_of(net: Any, name: str, positions: PositionResize = TIMM) -> VisionTower:
    return VisionTower(net, TowerConfig(name, image_size=64, positions=positions)).lock()


@pytest.fixture
def vit() -> VisionTower:
    torch.manual_seed(0)
    config = TowerConfig("vit_tiny_patch16_224", {**SIZES, "num_classes": 0}, image_size=64)
    tower = build_vision_tower(config)
    spread(tower.net)
    return tower.lock()


@pytest.mark.parametrize("positions", [PositionResize(), PositionResize("bicubic", False)])
@pytest.mark.parametrize("patch_size", [16, 8])
def test_tokens_are_those_of_kernel_and_positions_resized_by_hand(vit, positions, patch_size):
    tower = tower_of(vit.net, "vit_tiny_patch16_224", positions)
    stem = vit.net.patch_embed.proj
    kernel = resample_patch_embed(stem.weight, (patch_size, patch_size))
    grid = vit.net.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    for height, width in SHAPES:
        images = torch.randn(2, 3, height, width)
        size = (height // patch_size, width // patch_size)
        resized = F.interpolate(grid, size, mode=positions.mode, antialias=positions.antialias)
        expected = F.conv2d(images, kernel, stem.bias, stride=patch_size) + resized
        tokens = tower.embed_patches(images, patch_size)[:, 1:]
        torch.testing.assert_close(tokens, expected.flatten(2).mT, rtol=1e-5, atol=1e-5)
        assert torch.equal(tower.embed_patches(images, patch_size)[:, 1:], tokens)


def test_a_transposed_picture_with_transposed_weights_looks_alike(vit):
    net = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=0).eval()
    weights = {name: value.clone() for name, value in vit.net.state_dict().items()}
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mT
    slots, grid = weights["pos_embed"].split((1, 16), dim=1)
    turned = grid.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    net.load_state_dict(weights | {"pos_embed": torch.cat([slots, turned], dim=1)})
    tower = tower_of(net, "vit_tiny_patch16_224", PositionResize())
    images = torch.randn(2, 3, 32, 80)
    for patch_size in (16, 8):
        found = tower(images.mT, patch_size)
        torch.testing.assert_close(found, vit(images, patch_size), rtol=1e-5, atol=1e-5)
    assert (vit(images.mT, 16) - vit(images, 16)).abs().max() > 0.1


def test_squares_do_not_depend_on_what_other_shapes_were_read(vit):
    images = torch.randn(2, 3, 64, 64)
    alone = vit(images, 16), vit(images, 8)
    for height, width in SHAPES[1:]:
        vit(torch.randn(1, 3, height, width), 8)
    assert torch.equal(vit(images, 16), alone[0])
    assert torch.equal(vit(images, 8), alone[1])


def test_one_kernel_serves_all_grids_and_few_are_kept(vit, monkeypatch):
    monkeypatch.setattr("contrastive.vision.stems.MAX_STEMS", 3)
    for columns in range(1, 7):
        vit(torch.randn(1, 3, 16, 8 * columns), 8)
    stems = list(vit._stems.kept.values())
    assert len(stems) == 3
    assert len({kernel.data_ptr() for kernel, *_ in stems}) == 1
    assert len({positions.shape for *_, positions in stems}) == 3


def test_kept_stems_are_bounded_in_bytes(vit, monkeypatch):
    kernel = vit.stem(8, (1, 1)).kernel.nbytes
    monkeypatch.setattr("contrastive.vision.stems.MAX_STEM_BYTES", 6 * kernel)
    for patch_size in range(6, 13):  # of 0.6 to 2.3 times as many bytes
        vit(torch.randn(1, 3, patch_size, 2 * patch_size), patch_size)
        kept = {stem.kernel.shape[-1]: stem.kernel.nbytes for stem in vit._stems.kept.values()}
        assert sum(kept.values()) <= 6 * kernel
    assert [*kept] == [10, 11, 12]


def test_bfloat16_cuts_the_same_patches():
    images = torch.randn(2, 3, 32, 80)
    kernel = torch.randn(5, 3, 16, 16)
    expected = F.conv2d(images, kernel, stride=16).flatten(2).mT
    patches = cut_patches(images, 16)
    torch.testing.assert_close(patches @ kernel.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
        "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3",
    ],
)  # fmt: skip
def test_equals_timm_on_rectangles(name):
    """Positions by timm's own rule, stored, rotary or both."""
    torch.manual_seed(0)
    net = spread(timm.create_model(name, **SIZES, num_classes=0, dynamic_img_size=True))
    tower = tower_of(net, name)
    assert tower.flexible
    for height, width in SHAPES:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = net.forward_head(net.forward_features(images), pre_logits=True)
        torch.testing.assert_close(tower(images, 16), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap",
        "naflexvit_base_patch16_parfac_gap", "naflexvit_base_patch16_map",
    ],
)  # fmt: skip
def test_equals_a_naflex_vit_of_timm_in_batches_of_several_shapes(name):
    """Also those that keep the aspect ratio of positions (`par`) or store two lines (`fac`)."""
    torch.manual_seed(0)
    net = spread(timm.create_model(name, **NAFLEX, num_classes=0))
    rule = PositionResize(net.embeds.pos_embed_interp_mode, net.embeds.pos_embed_antialias)
    if "fac" in name:
        rule = PositionResize("bilinear", antialias=False)
    tower = tower_of(net, name, rule)
    images = [torch.randn(1, 3, height, width) for height, width in SHAPES]
    found = torch.cat([tower(image, 16) for image in images])
    torch.testing.assert_close(found, packed(net, images, 16), rtol=1e-5, atol=1e-5)


def packed(net: Any, images: list[Tensor], patch_size: int) -> Tensor:
    """timm's features of images padded into one batch of patches with coordinates."""
    grids = [(i.shape[-2] // patch_size, i.shape[-1] // patch_size) for i in images]
    longest = max(rows * columns for rows, columns in grids)
    cells = torch.zeros(len(images), longest, 3 * patch_size**2)
    places = torch.zeros(len(images), longest, 2, dtype=torch.int64)
    valid = torch.zeros(len(images), longest, dtype=torch.bool)
    for row, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        patches = cut_patches(image, patch_size).unflatten(2, (3, -1)).mT.flatten(2)
        count = rows * columns
        cells[row, :count] = patches[0]
        places[row, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[row, :count] = True
    with torch.no_grad():
        features = net.forward_features(cells, patch_coord=places, patch_valid=valid)
        return net.forward_head(**features, pre_logits=True)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, PositionResize("bicubic", antialias=True)),
        ({"pos_embed_interp_mode": "bilinear"}, PositionResize("bilinear", antialias=True)),
        ({"pos_embed_antialias": False}, PositionResize("bicubic", antialias=False)),
        ({"pos_embed_use_grid_sample": True, "pos_embed_interp_mode": "bilinear"},
         PositionResize("bilinear", antialias=False)),
    ],
    ids=["bicubic", "bilinear", "no antialias", "grid sample"],
)  # fmt: skip
def test_a_plain_vit_equals_timms_naflex_vit_of_the_same_weights(vit, options, rule):
    """With each of timm's ways to resize positions, the rule that is the same."""
    args = {**SIZES, "num_classes": 0, "use_naflex": True}
    naflex: Any = timm.create_model("vit_tiny_patch16_224", **args, **options).eval()
    weights = {name: value.clone() for name, value in vit.net.state_dict().items()}
    naflex.load_state_dict(checkpoint_filter_fn(weights, naflex))
    tower = tower_of(vit.net, "vit_tiny_patch16_224", rule)
    images = [torch.randn(1, 3, height, width) for height, width in SHAPES]
    found = torch.cat([tower(image, 16) for image in images])
    torch.testing.assert_close(found, packed(naflex, images, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "patch_size", "sentence"),
    [
        ((64, 96), 24, "does not divide height and width of 64 x 96 px; allowed .*: 16, 8, 4$"),
        ((45, 75), 16, "does not divide height and width of 45 x 75 px; allowed .*: 15, 5, 3$"),
        ((1, 64), 16, "does not divide height and width of 1 x 64 px; allowed at 1 x 64 px: none$"),
        ((0, 64), 16, "allowed at 0 x 64 px: none$"),
        ((0, 0), 16, "allowed at 0 px: none$"),
        ((64, 64), 0, "patch size 0 does not divide the image side of 64 px; allowed at 64 px: 16"),
    ],
)
def test_what_no_patch_divides_is_one_sentence(vit, shape, patch_size, sentence):
    with pytest.raises(UsageError, match=sentence):
        vit(torch.zeros(1, 3, *shape), patch_size)
