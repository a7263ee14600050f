"""Image towers: parity with the programs their weights come from, and what locking promises."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from contrastive import load_vision_tower
from contrastive.vision.build import build_vision_tower
from contrastive.vision.earlier import keep_transform
from contrastive.vision.formats.dinov2s import dinov2s_file
from contrastive.vision.formats.own_format import save_vision_tower
from contrastive.vision.resize import PositionResize
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError

ROOT = Path(__file__).parents[1]
PARITY = ROOT / "tests" / "parity"
GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture
def small_vit() -> TowerConfig:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return TowerConfig("vit_tiny_patch16_224", sizes | {"num_classes": 0}, image_size=64)


@pytest.mark.parametrize("side", GRIDS)
@pytest.mark.parametrize("name", ["flexi_tok_p32_g7", "flexi_gap_p16_g15"])
def test_matches_the_reference_at_every_grid(name, side):
    file = PARITY / f"bigvision_{name}.npz"
    tower = load_vision_tower(f"bigvision:{file}")
    with np.load(file) as archive:
        images = torch.from_numpy(archive["image"]).permute(0, 3, 1, 2).float()
        expected = {
            part: torch.from_numpy(archive[f"out/seqhw={side}/{part}"])
            for part in ("stem", "pre_logits", "logits")
        }
    with torch.no_grad():
        features = tower(images, patch_size=240 // side)
        kernel, _, _ = tower.stem(240 // side, (side, side))
        stem = torch.nn.functional.conv2d(
            images[:1], kernel, tower.net.patch_embed.proj.bias, stride=240 // side
        )[:, :, :2, :2].permute(0, 2, 3, 1)
    assert relative(stem, expected["stem"]) <= 1e-4
    assert relative(features, expected["pre_logits"]) <= 1e-4
    assert relative(tower.net.head(features), expected["logits"]) <= 1e-4


def test_attention_pooling_of_big_vision_loads(tmp_path):
    """The MAP head, against the same maths written out from the reference's definition."""
    rng = np.random.default_rng(0)
    with np.load(PARITY / "bigvision_flexi_gap_p16_g15.npz") as archive:
        raw = {n.removeprefix("params/"): archive[n] for n in archive.files if "params/" in n}
    d, heads, mlp = 32, 2, 64
    shapes = {
        "probe": (1, 1, d), "LayerNorm_0/scale": (d,), "LayerNorm_0/bias": (d,),
        "MlpBlock_0/Dense_0/kernel": (d, mlp), "MlpBlock_0/Dense_0/bias": (mlp,),
        "MlpBlock_0/Dense_1/kernel": (mlp, d), "MlpBlock_0/Dense_1/bias": (d,),
    }  # fmt: skip
    attention = "MultiHeadDotProductAttention_0/"
    for part in ("query", "key", "value"):
        shapes |= {
            f"{attention}{part}/kernel": (d, heads, 16),
            f"{attention}{part}/bias": (heads, 16),
        }
    shapes |= {f"{attention}out/kernel": (heads, 16, d), f"{attention}out/bias": (d,)}
    head = {k: (rng.normal(size=s) * 0.3).astype(np.float32) for k, s in shapes.items()}
    file = tmp_path / "map.npz"
    np.savez(
        file,
        **{
            f"img/{k}": v for k, v in (raw | {f"MAPHead_0/{k}": v for k, v in head.items()}).items()
        },
    )
    tower = load_vision_tower(f"bigvision:{file}@240")
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        tokens = tower.net.norm(tower.net.blocks(tower.embed_patches(images, 40)))
        got = tower(images, 40)
    w = {k: torch.from_numpy(v) for k, v in head.items()}
    q, k, v = (
        torch.einsum("bnd,dhe->bhne", x, w[f"{attention}{p}/kernel"])
        + w[f"{attention}{p}/bias"][:, None]
        for p, x in (("query", w["probe"].expand(2, 1, d)), ("key", tokens), ("value", tokens))
    )
    mixed = (q @ k.mT / 4.0).softmax(-1) @ v
    x = (
        torch.einsum("bhne,hed->bnd", mixed, w[f"{attention}out/kernel"])
        + w[f"{attention}out/bias"]
    )
    y = torch.nn.functional.layer_norm(x, (d,), w["LayerNorm_0/scale"], w["LayerNorm_0/bias"], 1e-6)
    y = y @ w["MlpBlock_0/Dense_0/kernel"] + w["MlpBlock_0/Dense_0/bias"]
    y = torch.nn.functional.gelu(y, approximate="tanh") @ w["MlpBlock_0/Dense_1/kernel"]
    assert relative(got, (x + y + w["MlpBlock_0/Dense_1/bias"])[:, 0]) <= 1e-5


def test_dinov2s_equals_its_onnx_file():
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = onnx.load(str(dinov2s_file()))
    final = next(n for n in graph.graph.node if "backbone.layernorm.bias" in n.input)
    tokens = helper.make_tensor_value_info(final.output[0], TensorProto.FLOAT, None)
    graph.graph.output.append(tokens)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([final.output[0]], {"input_image": images.numpy()})
    with torch.no_grad():
        got = load_vision_tower("dinov2s")(images, patch_size=14)
    assert relative(got, torch.from_numpy(expected)[:, 0]) <= 1e-5


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.map", "deit3_small_patch16_224"]
)
def test_equals_timm_at_its_own_patch_and_image_size(name, tmp_path):
    name, _, pooling = name.partition(".")
    options = {"global_pool": "map", "class_token": False} if pooling else {}
    net = timm.create_model(name, depth=2, **options).eval()
    tower = VisionTower(net, TowerConfig(name, image_size=224)).lock()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(images), pre_logits=True)
    assert tower.flexible
    torch.testing.assert_close(tower(images, 16), expected)


def test_timm_spec_reads_a_file_and_its_facts(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224").eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    tower = load_vision_tower(f"timm:vit_tiny_patch16_224@{tmp_path / 'net.safetensors'}")
    assert (tower.image_size, tower.mean) == (224, (0.5, 0.5, 0.5))
    assert tower.patch_sizes == (56, 32, 28, 16, 14, 8)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(images, 16), net.forward_head(net.forward_features(images), pre_logits=True)
        )


def test_a_convnet_has_one_patch_size_and_says_so():
    net = timm.create_model("resnet10t", num_classes=0).eval()
    tower = VisionTower(net, TowerConfig("resnet10t", image_size=64)).lock()
    assert tower.patch_sizes == (32,)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(tower(images), net(images))
    with pytest.raises(UsageError, match="cannot change its patch size; allowed: 32"):
        tower(images, 16)


def test_any_square_image_that_the_patch_divides(small_vit):
    tower = build_vision_tower(small_vit).lock()
    assert tower(torch.randn(1, 3, 96, 96), 12).shape == (1, 32)
    with pytest.raises(UsageError, match="patch size 15 does not divide the image side of 96 px"):
        tower(torch.randn(1, 3, 96, 96), 15)


def test_locked_stays_locked_and_resizes_nothing_per_call(small_vit, monkeypatch):
    tower = build_vision_tower(small_vit).lock()
    parent = torch.nn.Sequential(tower).train()
    assert parent.training
    assert not tower.training
    assert not tower.net.training
    assert not any(p.requires_grad for p in tower.parameters())
    images = torch.randn(2, 3, 64, 64)
    first = tower(images, 32)
    monkeypatch.setattr("contrastive.vision.stems.resized_stem", lambda *_: pytest.fail("again"))
    torch.testing.assert_close(tower(images, 32), first)


def test_new_weights_replace_kept_kernels(small_vit):
    tower = build_vision_tower(small_vit).lock()
    images = torch.randn(2, 3, 64, 64)
    before = tower(images, 32)
    other = build_vision_tower(small_vit)
    tower.load_state_dict(other.state_dict())
    assert not torch.allclose(before, tower(images, 32))
    torch.testing.assert_close(tower(images, 32), other.eval()(images, 32))


def test_unlocked_gradients_reach_kernel_and_positions(small_vit):
    tower = build_vision_tower(small_vit)
    tower(torch.randn(2, 3, 64, 64), 8).square().sum().backward()
    assert tower.net.patch_embed.proj.weight.grad.abs().sum() > 0
    assert tower.net.pos_embed.grad.abs().sum() > 0


def test_a_tower_loads_without_libraries_that_it_does_not_need(tmp_path):
    file = PARITY / "bigvision_flexi_tok_p32_g7.npz"
    code = f"""
import sys
from contrastive import load_vision_tower
from contrastive.vision.formats.own_format import save_vision_tower
print(set(sys.modules) & {{"timm", "open_clip", "transformers"}})
save_vision_tower(load_vision_tower("bigvision:{file}"), "{tmp_path}/tower")
load_vision_tower("{tmp_path}/tower")
print(set(sys.modules) & {{"open_clip", "transformers", "vit_pytorch", "onnx"}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("set()\nset()\n", 0), done.stderr


def test_saved_tower_loads_with_its_rule_and_patch_sizes(tmp_path):
    tower = load_vision_tower(f"bigvision:{PARITY / 'bigvision_flexi_tok_p32_g7.npz'}")
    save_vision_tower(tower, tmp_path / "tower")
    again = load_vision_tower(str(tmp_path / "tower"))
    images = torch.randn(2, 3, 240, 240)
    assert again.patch_sizes == tower.patch_sizes
    assert again.fingerprint == tower.fingerprint
    assert torch.equal(again(images, 48), tower(images, 48))


def test_fingerprint_follows_the_weights(small_vit):
    tower = build_vision_tower(small_vit).lock()
    before = tower.fingerprint
    assert before == tower.fingerprint
    tower.net.cls_token.data[0, 0, 0] += 1
    assert tower.fingerprint != before


def test_a_tower_keeps_the_fingerprint_that_caches_and_indices_hold():
    config = TowerConfig(
        "vit_tiny_patch16_224",
        {"depth": 1, "num_classes": 0},
        patch_sizes=(56, 32, 16),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        positions=PositionResize("bicubic", antialias=False),
        projection=4,
    )
    tower = build_vision_tower(config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 7 - 3).view(parameter.shape))
    assert tower.fingerprint == "624dafff643679d1d22c98b7de3a7dec"
    tiny = load_vision_tower(f"bigvision:{PARITY / 'bigvision_flexi_tok_p32_g7.npz'}")
    assert tiny.use_transform(1).fingerprint == "1f92a162eb4b5cb9ba801bd2e500f407"
    dinov2s = load_vision_tower("dinov2s")
    assert dinov2s.use_transform(1).fingerprint == "291eccb07a8ea6f5d3aa3fa51d39e9db"


def test_named_towers_have_the_newest_transform_and_folders_their_own(small_vit, tmp_path):
    named = load_vision_tower(f"bigvision:{PARITY / 'bigvision_flexi_tok_p32_g7.npz'}")
    assert named.transform.version == 2
    save_vision_tower(build_vision_tower(small_vit), tmp_path / "first")
    file = tmp_path / "first" / "config.json"
    config = json.loads(file.read_text())
    del config["vision"]["transform"], config["blake2b"]  # as 0.1 wrote it
    file.write_text(json.dumps(config))
    tower = load_vision_tower(str(tmp_path / "first"))
    assert tower.transform.version == 1
    save_vision_tower(tower.use_transform(2), tmp_path / "second")
    assert load_vision_tower(str(tmp_path / "second")).transform.version == 2
    config["vision"]["transform"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="version 3 of the transform; allowed: 1, 2"):
        load_vision_tower(str(tmp_path / "first"))


def test_a_tower_keeps_the_transform_that_something_was_begun_with(small_vit, capsys):
    tower = build_vision_tower(small_vit)
    first = tower.fingerprint
    second = tower.use_transform(2).fingerprint
    assert first != second
    for known in (second, "another"):
        assert not keep_transform(tower, known, "runs/x")
        assert tower.fingerprint == second
    assert not capsys.readouterr().err
    assert keep_transform(tower, first, "runs/x")
    assert not keep_transform(tower, first, "runs/x")
    assert tower.fingerprint == first
    assert capsys.readouterr().err.count("runs/x was begun with images resized by Pillow") == 1


def test_a_field_added_later_is_hashed_only_where_it_is_not_at_its_default(small_vit):
    @dataclass(frozen=True)
    class LaterResize(PositionResize):
        align: bool = False

    @dataclass(frozen=True)
    class Later(TowerConfig):
        crop: float = 1.0

    def later(align: bool, crop: float) -> dict[str, Any]:
        known = {**vars(small_vit), "positions": LaterResize(align=align)}
        return Later(**known, crop=crop).hashed()

    old = small_vit.hashed()
    assert later(False, 1.0) == old
    assert later(False, 0.9) == {**old, "crop": 0.9}
    assert later(True, 1.0) == {**old, "positions": {**old["positions"], "align": True}}


def test_a_configuration_keeps_its_keys_on_disk(small_vit):
    keys = "timm_name timm_args image_size patch_sizes mean std positions library projection"
    keys += " transform"
    values = small_vit.to_json()
    assert list(values) == keys.split()
    assert TowerConfig.from_json(json.loads(json.dumps(values))) == small_vit


def test_tokens_and_gflops(small_vit):
    tower = build_vision_tower(small_vit).lock()
    assert tower.num_tokens(16) == 17
    n, d = 17, 32  # per block: qkv 3, projection 1, MLP 8 (x d^2), and attention's two n x n x d
    expected = 2 * (16 * 3 * 16**2 * d + 2 * (12 * n * d * d + 2 * n * n * d)) / 1e9
    assert tower.gflops(16) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("nothing", "unknown image tower 'nothing'; allowed: timm:NAME"),
        ("timm:vit_enormous", "unknown timm model 'vit_enormous'"),
        ("timm:vit_tiny_patch16_224@absent.safetensors", "no such file: absent.safetensors"),
        ("bigvision:absent.npz", "no such file: absent.npz"),
    ],
)
def test_unknown_towers_are_one_sentence(spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_vision_tower(spec)


@pytest.mark.parametrize("content", ["pickle", "junk", "other"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_not_its_weights_are_one_sentence(content, suffix, tmp_path):
    file = tmp_path / f"weights.{suffix}"
    if content == "junk" or (content, suffix) == ("pickle", "safetensors"):
        file.write_bytes(b"not weights at all")
    elif content == "pickle":
        torch.save({"x": Path("code that unpickling would run")}, file)
    elif suffix == "pt":
        torch.save({"x": torch.ones(1)}, file)
    else:
        save_file({"x": torch.ones(1)}, file)
    with pytest.raises(UsageError, match=r"cannot be read as weights|weights of another model"):
        load_vision_tower(f"timm:vit_tiny_patch16_224@{file}")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("truncated", "is no npz archive of arrays: BadZipFile"),
        ("npy", "is no npz archive of arrays"),
        ("pos_embedding", r"holds no whole big_vision ViT: KeyError\('pos_embedding'\)"),
        ("Transformer/encoder_norm/scale", "holds no whole big_vision ViT: KeyError"),
        ("flat", "holds no whole big_vision ViT: ValueError"),
    ],
)
def test_a_damaged_npz_is_one_sentence(damage, sentence, tmp_path):
    whole, file = PARITY / "bigvision_flexi_tok_p32_g7.npz", tmp_path / "x.npz"
    arrays, data = dict(np.load(whole)), whole.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "npy":
        np.save(tmp_path / "x.npy", np.zeros(3))
        (tmp_path / "x.npy").rename(file)
    else:
        name = next(n for n in arrays if n.endswith(damage)) if damage != "flat" else ""
        kernel = next(n for n in arrays if n.endswith("embedding/kernel"))
        arrays.pop(name, None)
        arrays |= {kernel: arrays[kernel].ravel()} if damage == "flat" else {}
        np.savez(file, **arrays)
    with pytest.raises(UsageError, match=sentence):
        load_vision_tower(f"bigvision:{file}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (None, r"config\.json: not an image tower's configuration: TypeError"),
        ({}, r"config\.json: not an image tower's configuration: KeyError"),
        ({"library": "foo"}, "has 'foo'; allowed: timm, transformers, open_clip, vit_pytorch"),
        ({"positions": {"mode": "nearest"}}, "has 'nearest'; allowed: bilinear, bicubic"),
    ],
)
def test_a_configuration_of_no_tower_is_one_sentence(changes, sentence, small_vit, tmp_path):
    save_vision_tower(build_vision_tower(small_vit), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["blake2b"]
    config["vision"] = {**config["vision"], **changes} if changes else changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=sentence):
        load_vision_tower(str(tmp_path))


def test_patch_sizes_that_are_refused_are_not_offered():
    config = TowerConfig("vit_tiny_patch16_224", {"img_size": 240}, 240, (60, 7))
    tower = build_vision_tower(config)
    with pytest.raises(UsageError, match=r"patch size 7 .*; allowed at 240 px: 60$"):
        tower.check_patch_size(7)
    with pytest.raises(UsageError, match=r"image side of 49 px; allowed at 49 px: 7$"):
        tower.check_patch_size(60, (49, 49))
    with pytest.raises(UsageError, match=r"allowed at 30 px: 6, 5, 3, 2, 1$"):
        build_vision_tower(replace(config, patch_sizes=(7,))).check_patch_size(60, (30, 30))


def test_a_towers_own_patch_size_need_not_be_listed():
    config = TowerConfig("vit_tiny_patch16_224", {"img_size": 64}, 64, (32, 8))
    assert build_vision_tower(config).own_patch_size == 16
    odd = TowerConfig("vit_tiny_patch16_224", {"img_size": 72}, 72, (36, 12))
    assert build_vision_tower(odd).own_patch_size == 12  # 16 does not divide 72


def test_a_damaged_folder_is_one_sentence(small_vit, tmp_path):
    save_vision_tower(build_vision_tower(small_vit), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be read as weights"):
        load_vision_tower(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not a model folder"):
        load_vision_tower(str(tmp_path))
