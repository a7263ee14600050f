"""Which tokens of which blocks an image tower gives."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TOWER
from test_training import config

from contrastive import LitModel, load_vision_tower
from contrastive.flexify.config import StudentConfig, TeacherConfig
from contrastive.flexify.student import build_student
from contrastive.train.closed_form import whitening
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.build import build_vision_tower
from contrastive.vision.config import VisionConfig
from contrastive.vision.formats.own_format import save_vision_tower
from contrastive.vision.select_features import select_features
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
NETS = {
    "class token": ("vit_small_patch16_224", SMALL),
    "mean, norm after it": ("vit_small_patch16_224", {**SMALL, "global_pool": "avg"}),
    "attention": ("vit_base_patch16_siglip_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "distilled": ("deit_small_distilled_patch16_224", SMALL),
    "rotary": ("eva02_tiny_patch14_224", SMALL),
    "prefix in the mean": ("vit_small_patch16_224", {**SMALL, "pool_include_prefix": True}),
    "norm without a bias": ("vit_small_patch16_224", {**SMALL, "norm_layer": "rmsnorm"}),
    "class joins last": ("cait_xxs24_224", SMALL),
}
PREFIX = {"attention": 0, "registers": 5, "distilled": 2, "class joins last": 0}


def tower_of(name: str) -> VisionTower:
    architecture, args = NETS[name]
    torch.manual_seed(0)
    tower = build_vision_tower(TowerConfig(architecture, args, image_size=32)).lock()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower


def expected(tower: VisionTower, images: torch.Tensor, term: str, prefix: int) -> torch.Tensor:
    """What a hook on the network's own block sees, normed and taken by hand."""
    token, _, block = term.partition("@")
    net, seen = tower.net, []
    number = int(block) - (int(block) > 0)
    hook = net.blocks[number].register_forward_hook(lambda *args: seen.append(args[2]))
    last = net.forward_features(images)
    hook.remove()
    if token == "own":
        return net.forward_head(last, pre_logits=True)
    normed = F.layer_norm(seen[0], seen[0].shape[-1:], eps=1e-6)
    return normed[:, 0] if token == "cls" else normed[:, prefix:].mean(1)


@pytest.mark.parametrize("expression", ["cls@2", "mean@-2", "cls@-1", "own+cls@1+mean@3"])
@pytest.mark.parametrize("name", NETS)
def test_features_are_the_networks_own_tokens(name, expression):
    tower = tower_of(name)
    if "cls" in expression and name in ("attention", "class joins last"):
        with pytest.raises(UsageError, match="allowed: own"):
            select_features(tower, expression)
        return
    images = torch.randn(2, 3, 32, 32)
    terms = [t if "@" in t else f"{t}@-1" for t in expression.split("+")]
    wanted = torch.cat([expected(tower, images, t, PREFIX.get(name, 1)) for t in terms], dim=1)
    selected = select_features(tower, expression)
    torch.testing.assert_close(selected(images, 8), wanted, rtol=1e-4, atol=1e-4)
    assert selected.embed_dim == wanted.shape[1]
    assert selected.locked == tower.locked
    assert selected.fingerprint != tower.fingerprint


@pytest.mark.parametrize("name", ["class token", "mean, norm after it", "attention"])
def test_without_a_block_a_vector_has_the_networks_own_norm(name):
    tower = tower_of(name)
    images = torch.randn(2, 3, 32, 32)
    last = tower.net.forward_features(images)
    mean = tower.net.fc_norm(last[:, PREFIX.get(name, 1) :].mean(1))
    torch.testing.assert_close(select_features(tower, "mean")(images, 8), mean)
    joined = select_features(tower, "own+mean")(images, 8)
    torch.testing.assert_close(joined, torch.cat([tower(images, 8), mean], dim=1))


def test_no_block_after_the_last_that_is_needed_is_kept_or_computed():
    tower = tower_of("class token")
    one, two = (select_features(tower, e) for e in ("cls@-2", "cls@1+cls@2"))
    assert (len(one.net.blocks), len(two.net.blocks)) == (3, 2)
    assert two.gflops(8) < one.gflops(8) < tower.gflops(8)
    assert one.config.features == "own"  # a plain ViT like any other
    rotary = tower_of("rotary")
    assert select_features(rotary, "cls@1").gflops(8) < 0.5 * rotary.gflops(8)


@pytest.mark.parametrize("expression", ["mean@3", "cls@-3+mean"])
def test_a_saved_tower_gives_the_same_features(expression, tmp_path):
    tower = select_features(tower_of("class token"), expression)
    save_vision_tower(tower, tmp_path)
    again = load_vision_tower(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images, 4), tower(images, 4), rtol=0, atol=0)
    assert again.fingerprint == tower.fingerprint
    assert again.config.features == tower.config.features


def test_counted_from_the_end_it_is_the_same_tower():
    one, two = (select_features(tower_of("class token"), e) for e in ("cls@-2+mean", "cls@3+mean"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("dog", "neither own, cls nor mean"),
        ("cls+", "neither own"),
        ("own@3", "neither own"),
        ("cls@0", "1 to 4"),
        ("cls@5", "1 to 4"),
        ("mean@-5", "1 to 4"),
        ("cls@3+cls@3", "twice"),
        ("cls@-1+cls@4", "twice"),
    ],
)
def test_what_a_tower_does_not_have_is_refused(expression, says):
    with pytest.raises(UsageError, match=says):
        select_features(tower_of("class token"), expression)


def test_a_tower_that_was_saved_with_other_features_has_no_own_ones_to_join(tmp_path):
    save_vision_tower(select_features(tower_of("class token"), "cls@1+mean@2"), tmp_path)
    with pytest.raises(UsageError, match=r"saved with the features cls@1\+mean@2; allowed: own al"):
        load_vision_tower(str(tmp_path), features="own+cls@1")
    assert load_vision_tower(str(tmp_path), features="own").embed_dim == 32
    assert load_vision_tower(str(tmp_path), features="cls@1").embed_dim == 16


def test_a_typo_is_refused_before_a_tower_is_loaded():
    with pytest.raises(UsageError, match=r"vision\.features 'dog'"):
        VisionConfig(features="dog")
    with pytest.raises(UsageError, match=r"teacher\.features 'dog'"):
        TeacherConfig(features="dog")
    with pytest.raises(UsageError, match="init_samples above 0"):
        TrainConfig(embed_dim=8, init_samples=0)


def test_a_network_that_cuts_no_patches_gives_its_own_features_only():
    config = TowerConfig("test_convnext", {"num_classes": 0}, image_size=160)
    tower = build_vision_tower(config)
    assert select_features(tower, "own") is tower
    with pytest.raises(UsageError, match="allowed: own"):
        select_features(tower, "mean")


def test_a_student_starts_as_its_teacher_with_the_same_features():
    tower = load_vision_tower(TINY_TOWER)
    teacher = TeacherConfig(tower=TINY_TOWER, features="own+mean@1")
    student = build_student(StudentConfig(), teacher, tower.native_patch_size)
    images = torch.randn(2, 3, 240, 240)
    wanted = select_features(tower, "own+mean@1")(images, 30)
    torch.testing.assert_close(student.eval()(images, 30), wanted)


def test_joined_features_are_whitened_to_the_width_of_one(tiny_text, emoji_shards, tmp_path):
    cfg = config(tmp_path, "run", tiny_text, emoji_shards, 0, steps=2)
    vision = dataclasses.replace(cfg.vision, features="own+mean@1")
    folder = train(dataclasses.replace(cfg, vision=vision))
    model = LitModel.from_pretrained(folder / "model")
    assert (model.vision.embed_dim, model.embed_dim) == (64, 32)
    images = torch.randn(2, 3, 240, 240)
    assert model.encode_image(images, 48).shape == model.encode_text(["a", "b"]).shape
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert LitModel.from_pretrained(again).image_fingerprint == model.image_fingerprint


def test_whitening_to_fewer_dimensions_keeps_those_of_most_variance():
    torch.manual_seed(0)
    features = torch.randn(5000, 4, dtype=torch.float64) * torch.tensor([1.0, 9.0, 0.1, 3.0])
    count = torch.tensor(5000.0, dtype=torch.float64)
    mean, matrix = whitening(
        count, features.sum(0), features.T @ features, shrinkage=0.0, embed_dim=2
    )
    white = (features.float() - mean) @ matrix
    torch.testing.assert_close(torch.cov(white.T), torch.eye(2), rtol=1e-2, atol=1e-2)
    strongest = matrix.norm(dim=1) * torch.tensor([1.0, 9.0, 0.1, 3.0])
    assert {*strongest.topk(2).indices.tolist()} == {1, 3}


@pytest.mark.parametrize("expression", ["cls@2", "own+cls@2"])
def test_one_vector_goes_to_timm_and_several_are_refused(expression, tmp_path: Path):
    import timm

    from contrastive.export.timm import export_timm

    tower = select_features(tower_of("class token"), expression)
    if "+" in expression:
        with pytest.raises(UsageError, match="joins the features own"):
            export_timm(tower, 4, tmp_path / "out")
        return
    export_timm(tower, 4, tmp_path / "out")
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    found = net.forward_head(net.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, tower(images, 4))
