"""Pictures of several shapes and patch sizes in one sequence give what each gives alone."""

from typing import Any

import pytest
import timm
import torch
from test_packing import block_diagonal
from test_rectangles import NAFLEX, SIZES, spread, tower_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from contrastive.model import shaped
from contrastive.model.shaped import ShapedPixels, shaped_features
from contrastive.varlen import attend_within, has_kernel
from contrastive.vision import tower as tower_module
from contrastive.vision.packed.block_diagonal import WithinPictures
from contrastive.vision.packed.forward import packs
from contrastive.vision.select_features import select_features
from contrastive.vision.tower import VisionTower
from data.errors import UsageError

FAMILIES = (
    "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384", "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_map",
)  # fmt: skip


def make_tower(name: str) -> VisionTower:
    """Two layers whose blocks matter as much as their residuals."""
    torch.manual_seed(0)
    args: dict[str, Any] = NAFLEX if "naflex" in name else SIZES
    net = spread(timm.create_model(name, **args, num_classes=0))
    with torch.no_grad():
        for part, parameter in net.named_parameters():
            if "gamma" in part:  # of layer scales, which start near zero
                parameter.uniform_(0.5, 1.5)
    return tower_of(net, name)


def make_images() -> list[ShapedPixels]:
    """Eleven, of 1 to 256 patches; two of each shape but the first three, none beside the other."""
    shapes = [(16, 16, 16), (8, 64, 64), (None, 64, 64)]
    shapes += [(16, 64, 64), (16, 32, 80), (16, 80, 32), (8, 16, 112)] * 2
    torch.manual_seed(1)
    return [ShapedPixels(size, torch.randn(3, height, width)) for size, height, width in shapes]


def alone(tower: VisionTower, images: list[ShapedPixels]) -> Tensor:
    """What each image gives by itself."""
    with torch.no_grad():
        return torch.cat([tower(pixels[None], size) for size, pixels in images])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_pictures_equal_each_alone(name):
    tower, images = make_tower(name), make_images()
    assert packs(tower)
    expected = alone(tower, images)
    assert (expected[4] - expected[5]).abs().max() > 0.1
    with torch.no_grad():
        found = shaped_features(tower, images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_pictures_give_no_rows():
    tower = make_tower("vit_tiny_patch16_224")
    assert shaped_features(tower, []).shape == (0, tower.embed_dim)


def test_rotary_positions_are_kept_of_few_grids():
    tower = make_tower("eva02_tiny_patch14_224")
    for columns in range(1, 2 * tower_module.MAX_STEMS):
        turns = tower.rotary_positions((2, columns))
        assert turns is not None
        assert len(turns) == 2 * columns
        assert 0 < len(tower._rotary) <= tower_module.MAX_STEMS


def test_long_lists_are_cut_into_several_sequences(monkeypatch):
    monkeypatch.setitem(shaped.MAX_PACKED, "cpu", 70)
    tower, images = make_tower("vit_tiny_patch16_224"), make_images()
    with torch.no_grad():
        found = shaped_features(tower, images)
    torch.testing.assert_close(found, alone(tower, images), rtol=1e-5, atol=1e-5)
    lengths = [1 + size for size in (1, 64, 256, 16, 10, 10, 28, 16, 10, 10, 28)]
    parts = shaped._packs(lengths, 70)
    assert sorted(place for part in parts for place in part) == list(range(11))
    assert all(sum(lengths[place] for place in part) <= 70 + 28 for part in parts[:-1])


@pytest.mark.parametrize("features", ["mean", "cls@1+mean", "own+mean@1"])
def test_any_features_are_read_of_packed_pictures(features):
    tower = select_features(make_tower("vit_small_patch16_dinov3"), features)
    images = make_images()
    with torch.no_grad():
        found = shaped_features(tower, images)
    torch.testing.assert_close(found, alone(tower, images), rtol=1e-5, atol=1e-5)


def test_a_tower_in_bfloat16_packs_too():
    tower, images = make_tower("eva02_tiny_patch14_224").to(torch.bfloat16), make_images()
    with torch.no_grad():
        found = shaped_features(tower, images)
    expected = alone(tower, images)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_the_kernel_for_several_lengths_is_told_where_each_picture_ends(monkeypatch):
    """A GPU's, here by a mask of n x n."""

    def varlen_attn(query, key, value, bounds, bounds_k, longest, longest_k, *, scale=None):
        calls.append(longest)
        assert bounds is bounds_k
        assert bounds.dtype == torch.int32
        assert longest == longest_k
        assert {part.dtype for part in (query, key, value)} == {torch.bfloat16}
        return block_diagonal(query, key, value, bounds, longest, scale)

    calls: list[int] = []
    monkeypatch.setattr("contrastive.vision.packed.block_diagonal.has_kernel", lambda _: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    tower, images = make_tower("eva02_tiny_patch14_224").to(torch.bfloat16), make_images()
    with torch.no_grad():
        found = shaped_features(tower, images)
    expected = alone(tower, images)
    assert calls == [257, 257]  # one call for each block
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_the_kernel_is_not_asked_for_where_it_is_missing_or_turned_off(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert has_kernel(gpu)
    with sdpa_kernel(SDPBackend.MATH):
        assert not has_kernel(gpu)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not has_kernel(gpu)


def test_attention_elsewhere_keeps_its_kernels_meanwhile(monkeypatch):
    """torch's switches are the process's, and a service reads texts in another thread."""

    def varlen_attn(query, *_, **__):
        flash = torch.backends.cuda
        assert flash.math_sdp_enabled()
        assert flash.mem_efficient_sdp_enabled()
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    query, bounds = torch.zeros(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
    assert attend_within(query, query, query, bounds, 3).equal(query)


def test_cudnn_is_not_asked_which_plans_for_every_number_of_tokens(monkeypatch):
    """Also where torch, of which a GPU of another kind than this machine's is asked, prefers it."""

    def select(*args: Any) -> int:
        chosen.append(real(*args))
        return chosen[-1]

    if not hasattr(varlen, "_select_backend"):
        pytest.skip("this torch has no other kernel to choose")
    chosen: list[int] = []
    real = varlen._select_backend
    monkeypatch.setattr(varlen, "_select_backend", select)
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda _: True)
    monkeypatch.setattr(varlen, "_cudnn_version", lambda _: 92600)
    monkeypatch.setattr(varlen, "_cudnn_decode_disabled", lambda _: False)
    with FakeTensorMode():
        query = torch.empty(100, 4, 64, device="cuda", dtype=torch.bfloat16)
        bounds = torch.empty(5, device="cuda", dtype=torch.int32)
        found = attend_within(query, query, query, bounds, 30, 0.1)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            attend_within(query, query, query, bounds, 30, 0.1)
    assert found.shape == query.shape
    assert chosen == [varlen._FLASH_ATTENTION_BACKEND, varlen._CUDNN_ATTENTION_BACKEND]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_pictures_equal_each_alone_on_a_gpu(name):
    """By the kernel for several lengths in bfloat16, by one call for each length in float32."""
    images = make_images()
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        tower = make_tower(name).to("cuda", dtype)
        with torch.no_grad():
            found = shaped_features(tower, images)
        there = [ShapedPixels(size, pixels.cuda()) for size, pixels in images]
        expected = alone(tower, there)
        assert (found - expected).norm() <= bound * expected.norm()


def test_the_blocks_see_all_pictures_at_once():
    tower = make_tower("vit_tiny_patch16_224")
    seen = []
    hook = tower.net.blocks[0].register_forward_hook(lambda _, args, out: seen.append(out.shape))
    with torch.no_grad():
        shaped_features(tower, make_images())
    hook.remove()
    assert seen == [(1, 2 + 65 + 257 + 2 * (17 + 11 + 11 + 29), 32)]  # with class tokens


def test_pictures_of_one_patch_size_share_a_product_of_the_stem():
    tower, counted = make_tower("vit_tiny_patch16_224"), []
    patches = tower.net.patch_embed.norm.register_forward_hook(
        lambda _, args, out: counted.append(out.shape[:2].numel())
    )
    with torch.no_grad():
        shaped_features(tower, make_images())
    patches.remove()
    assert sorted(counted) == [1 + 2 * (16 + 10 + 10), 64 + 2 * 28, 256]  # of 16, 8 and 4


def test_pictures_of_one_shape_are_read_as_ever(monkeypatch):
    """To the last bit, and without packing."""
    monkeypatch.setattr(shaped, "packed_features", None)
    tower = make_tower("vit_tiny_patch16_224")
    pixels = torch.randn(5, 3, 32, 80)
    with torch.no_grad():
        found = shaped_features(tower, [ShapedPixels(16, image) for image in pixels])
        assert torch.equal(found, tower(pixels, 16))


def test_towers_whose_attention_is_not_torchs_read_one_shape_at_a_time(monkeypatch):
    """CaiT's talking heads, an attention that is not fused; nor do compiled blocks."""
    net = spread(timm.create_model("cait_xxs24_224", **SIZES | {"depth": 2}, num_classes=0))
    tower, images = tower_of(net, "cait_xxs24_224"), make_images()
    assert not packs(tower)
    with torch.no_grad():
        found = shaped_features(tower, images)
    torch.testing.assert_close(found, alone(tower, images), rtol=1e-5, atol=1e-5)
    unfused, compiled = make_tower("vit_tiny_patch16_224"), make_tower("vit_tiny_patch16_224")
    unfused.net.blocks[1].attn.fused_attn = False
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # which takes seconds to import
    compiled.compile_blocks()
    assert not packs(unfused)
    assert not packs(compiled)


def test_what_stands_for_the_mask_goes_nowhere_else():
    within = WithinPictures([(2, 3)], torch.device("cpu"))
    with pytest.raises(TypeError, match="WithinPictures"):
        torch.add(torch.zeros(6, 6), within)


def test_a_patch_size_that_divides_one_picture_alone_is_refused():
    images = [ShapedPixels(16, torch.zeros(3, 64, 64)), ShapedPixels(16, torch.zeros(3, 60, 64))]
    with pytest.raises(UsageError, match="does not divide height and width of 60 x 64 px"):
        shaped_features(make_tower("vit_tiny_patch16_224"), images)
