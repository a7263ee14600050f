"""What a tower gives of each patch: of one space with what it gives of the whole image."""

import pytest
import torch
from conftest import TINY_TOWER
from PIL import Image
from test_features import tower_of

from contrastive import LitModel, load_vision_tower
from contrastive.model.text_side import TextSide
from contrastive.vision.build import build_vision_tower
from contrastive.vision.patch_features import patch_features
from contrastive.vision.select_features import select_features
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError

IMAGES = torch.randn(2, 3, 16, 40, generator=torch.Generator().manual_seed(0))
PREFIX = {"class token": 1, "registers": 5, "rotary": 1}


def model_of(tower: VisionTower, like: LitModel) -> LitModel:
    """With a text side of another model, and an affine that is not the identity."""
    model = LitModel(tower, TextSide(like.text.encoder, like.text.loss)).eval()
    torch.manual_seed(0)
    model.feature_mean.normal_()
    model.feature_whiten.normal_()
    return model


@pytest.mark.parametrize(
    ("name", "expression"),
    [("registers", "mean@2"), ("class token", "cls@1+mean"), ("rotary", "cls@1+mean@-1")],
)
def test_the_mean_of_the_patches_is_the_images_own_vector(name, expression, tiny_model):
    model = model_of(select_features(tower_of(name), expression), tiny_model)
    for patch_size in (8, 4):
        patches = patch_features(model.vision, IMAGES, patch_size)
        assert patches.shape[1:3] == (16 // patch_size, 40 // patch_size)
        whole = model.whiten(model.vision(IMAGES, patch_size))
        each = model.whiten(patches.flatten(0, 2)).unflatten(0, (2, -1))
        torch.testing.assert_close(each.mean(1), whole, rtol=1e-3, atol=1e-3)
        assert (each - whole[:, None]).abs().max() > 0.1


def test_a_mean_that_the_network_pools_itself_counts_as_one():
    tower = select_features(tower_of("class token"), "mean@3")
    assert tower.config.features == "own"  # cut after the block, with the mean as its own pooling
    patches = patch_features(tower, IMAGES, 8)
    torch.testing.assert_close(patches.mean((1, 2)), tower(IMAGES, 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PREFIX)
def test_without_a_mean_patches_go_where_the_class_token_goes(name):
    tower = tower_of(name)
    images = torch.randn(2, 3, 32, 32)
    last = tower.net.forward_features(images)[:, PREFIX[name] :]
    patches = patch_features(tower, images, 8)
    torch.testing.assert_close(patches.flatten(1, 2), tower.net.fc_norm(last))
    picked = select_features(tower, "cls@2")
    tokens = picked.family.after(
        picked.net, picked.embed_patches(images, 8), picked.rotary_positions((4, 4)), {2}
    )[2][:, PREFIX[name] :]
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    found = patch_features(picked, images, 8).flatten(1, 2)
    torch.testing.assert_close(found, normed, rtol=1e-4, atol=1e-4)


def test_attention_pooling_reads_one_patch_at_a_time():
    tower = tower_of("attention")
    images = torch.randn(2, 3, 32, 32)
    last = tower.net.forward_features(images)
    patches = patch_features(tower, images, 8).flatten(1, 2)
    for number in (0, 5):
        alone = tower.net.fc_norm(tower.net.attn_pool(last[:, number : number + 1]))
        torch.testing.assert_close(patches[:, number], alone, rtol=1e-4, atol=1e-4)


def test_the_value_path_is_the_last_block_with_values_in_place_of_attention():
    tower = tower_of("class token")
    images, net = torch.randn(2, 3, 32, 32), tower.net
    seen = []
    hook = net.blocks[-2].register_forward_hook(lambda *args: seen.append(args[2]))
    net.forward_features(images)
    hook.remove()
    block, tokens = net.blocks[-1], seen[0][:, 1:]
    values = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[2]
    tokens = tokens + block.attn.proj(values)
    tokens = tokens + block.mlp(block.norm2(tokens))
    found = patch_features(tower, images, 8, value_path=True).flatten(1, 2)
    torch.testing.assert_close(found, net.norm(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["class token", "rotary", "attention"])
def test_by_the_value_path_of_the_first_block_a_patch_sees_itself_alone(name):
    expression = "mean@1" if name == "attention" else "cls@1"
    tower = select_features(tower_of(name), expression)
    other = IMAGES.clone()
    other[:, :, 8:, 16:24] += 1  # row 1, column 2
    for value_path in (True, False):
        before, after = (patch_features(tower, i, 8, value_path) for i in (IMAGES, other))
        changed = (before - after).abs().amax((0, 3)) > 1e-4
        assert changed[1, 2]
        assert changed.all() or (value_path and changed.sum() == 1)


def test_towers_without_patches_say_so():
    mixer = build_vision_tower(TowerConfig("resnet10t", {"num_classes": 0}, image_size=32))
    for tower in (mixer, tower_of("class joins last")):
        with pytest.raises(UsageError, match="has no tokens of patches"):
            patch_features(tower, torch.zeros(1, 3, 32, 32))
    cait = select_features(tower_of("class joins last"), "mean@2")
    assert patch_features(cait, IMAGES, 8).shape == (2, 2, 5, 16)
    with pytest.raises(UsageError, match="does not divide"):
        patch_features(cait, IMAGES, 7)


def test_a_models_patches_have_unit_norm_and_the_texts_width(tiny_model):
    tower = select_features(load_vision_tower(TINY_TOWER), "mean@1")
    model = model_of(tower, tiny_model)
    picture = Image.new("RGB", (300, 200), "red")
    maps = model.encode_patches([picture, picture.rotate(90)], 40)
    assert maps.shape == (2, 6, 6, model.embed_dim)
    torch.testing.assert_close(maps.norm(dim=-1), torch.ones(2, 6, 6))
    normalised = model.transform(picture)
    torch.testing.assert_close(model.encode_patches(normalised, 40), maps[:1])
    torch.testing.assert_close(model.encode_patches(normalised[None], 40), maps[:1])
    wide = model.encode_patches(normalised[:, :80], 40)
    assert wide.shape == (1, 2, 6, model.embed_dim)
    with pytest.raises(UsageError, match="2 shapes"):
        model.encode_patches([normalised, normalised[:, :80]], 40)
    with pytest.raises(UsageError, match="no images"):
        model.encode_patches([], 40)
