"""Handing over: other libraries load what was written, and compute what we compute."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from launcher import ROOT
from PIL import Image
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from contrastive import LitModel, load_vision_tower
from contrastive.export.export_model import MIN_COSINE, export_model
from contrastive.export.timm import export_timm
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.open_clip import OpenClipTextTower
from contrastive.text.padding import pad_tokens
from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower import VisionTower
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError
from data.token_ids import TokenIds

TEXTS = ["a red bicycle", "two dogs", "the sun and a happy cat " * 12]
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def tiny_vit(**args) -> VisionTower:
    """DINOv2's architecture (class token, layer scale) at 56 px, with random weights."""
    config = TowerConfig(
        "vit_small_patch14_dinov2",
        {"img_size": 56, **SIZES, **args},
        image_size=56,
        patch_sizes=(28, 14),
        mean=(0.4, 0.5, 0.6),
    )
    tower = build_vision_tower(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower.lock()


def with_text(tower: VisionTower, text: str, pooling="mean") -> LitModel:
    """A model whose affine and text are random."""
    encoder = TextEncoder(load_text_tower(TextConfig(text, pooling)), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig(bias_init=-3.0))).eval()
    model.feature_mean.normal_(std=0.3)
    model.feature_whiten.add_(torch.randn_like(model.feature_whiten) / 8)
    return model


@pytest.fixture(scope="module", params=["mean", "cls", "open_clip"])
def model(request, tiny_text) -> LitModel:
    torch.manual_seed(0)
    if request.param == "open_clip":
        return with_text(tiny_vit(global_pool="avg"), "open_clip:ViT-S-32-alt")
    return with_text(tiny_vit(), tiny_text, request.param)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    # 84 x 56 after the resize: an odd margin would be cropped one pixel elsewhere by transformers
    return Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC)


def assert_same(theirs, ours) -> None:
    assert F.cosine_similarity(torch.as_tensor(theirs), ours).min() >= MIN_COSINE


def test_open_clip_loads_an_exported_model(model, picture, tmp_path):
    export_model(model, "open_clip", 28, tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    net, _, preprocess = open_clip.create_model_and_transforms(name)
    net.eval()
    with torch.no_grad():
        assert_same(net.encode_image(preprocess(picture)[None]), model.encode_image([picture], 28))
        texts = net.encode_text(open_clip.get_tokenizer(name)(TEXTS))
        assert_same(texts, model.encode_text(TEXTS))
        assert float(net.logit_bias) == -3
        assert float(net.logit_scale.exp()) == pytest.approx(10)


def test_transformers_loads_an_exported_model(model, picture, tmp_path):
    export_model(model, "transformers", 14, tmp_path / "out")
    net = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out").eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(
        text=TEXTS, images=picture, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = net(**inputs)
        images = net.get_image_features(inputs["pixel_values"]).pooler_output
    assert_same(out.image_embeds, model.encode_image([picture], 14))
    assert_same(images, model.encode_image([picture], 14))
    assert_same(out.text_embeds, model.encode_text(TEXTS))
    assert float(out.logits_per_image[0, 0]) == pytest.approx(
        10 * float((out.image_embeds @ out.text_embeds.T)[0, 0]), rel=1e-4
    )


def test_onnxruntime_runs_an_exported_model_on_batches_of_any_size(model, picture, tmp_path):
    export_model(model, "onnx", 28, tmp_path / "out")
    facts = json.loads((tmp_path / "out/config.json").read_text())
    image, text = (
        onnxruntime.InferenceSession(tmp_path / "out" / facts[part]["file"])
        for part in ("image", "text")
    )
    for count in (1, 5):
        pixels = torch.stack([model.transform(picture)] * count)
        (embeds,) = image.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        assert_same(embeds, model.encode_image(pixels, 28))
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    tower = model.text.encoder.tower
    for texts in (TEXTS[:1], TEXTS):
        ids = TokenIds.of(tower.tokenizer(texts))
        length = facts["text"]["length"] or int(ids.lengths.max())
        tokens = pad_tokens(ids, length, facts["pad_id"])
        given = {"input_ids": tokens.ids.numpy(), "attention_mask": tokens.mask.numpy()}
        (embeds,) = text.run(None, {name: given[name] for name in facts["text"]["inputs"]})
        assert_same(embeds, model.encode_text(texts))
    assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".onnx", ".json", ".md"}


def test_a_moved_folder_is_mended_by_the_line_in_its_readme(tiny_text, tmp_path):
    model = with_text(tiny_vit(), tiny_text)
    export_model(model, "open_clip", 14, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "else")
    readme = (tmp_path / "else/README.md").read_text()
    (line,) = (row for row in readme.splitlines() if row.startswith("    sed "))
    subprocess.run(line, shell=True, check=True, cwd=tmp_path / "else")
    net = open_clip.create_model(f"local-dir:{tmp_path / 'else'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'else'}")(TEXTS)
    with torch.no_grad():
        assert_same(net.encode_text(tokens), model.encode_text(TEXTS))


@pytest.mark.parametrize("pooling", ["avg", "map"])
def test_towers_without_class_token_go_to_transformers_alone(pooling, tiny_text, tmp_path):
    model = with_text(tiny_vit(class_token=False, global_pool=pooling), tiny_text)
    assert min(export_model(model, "transformers", 28, tmp_path / "out")) >= MIN_COSINE
    with pytest.raises(UsageError, match="open_clip cannot express this image tower at patch size"):
        export_model(model, "open_clip", 28, tmp_path / "other")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_tower_that_is_no_vit_goes_to_open_clip_as_a_timm_trunk(tiny_text, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_convnext", num_classes=0)
    tower = VisionTower(net, TowerConfig("test_convnext", {"num_classes": 0}, image_size=96)).lock()
    model = with_text(tower, tiny_text, "cls")
    for to in ("open_clip", "transformers"):
        assert min(export_model(model, to, tower.patch_sizes[0], tmp_path / to)) >= MIN_COSINE


def test_a_quick_gelu_stays_one_in_transformers(tmp_path):
    torch.manual_seed(0)
    facts = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    facts = {"embed_dim": 24, "text_cfg": facts, "quick_gelu": True}
    encoder = TextEncoder(OpenClipTextTower("ViT-B-32-quickgelu", 16, facts), 24)
    model = LitModel(tiny_vit(), TextSide(encoder, LossConfig())).eval()
    export_model(model, "transformers", 28, tmp_path / "out")
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["hidden_act"] == "quick_gelu"


class Foreign(timm.models.ConvNeXt):
    """No network of timm's, though it looks like one."""


@pytest.mark.parametrize("to", ["open_clip", "transformers", "onnx"])
def test_a_network_that_is_not_timms_is_refused(to, tiny_text, tmp_path):
    net = Foreign(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=0)
    model = with_text(VisionTower(net, TowerConfig("foreign", image_size=64)), tiny_text)
    with pytest.raises(UsageError, match="foreign cannot be exported; allowed: timm's own"):
        export_model(model, to, 32, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_other_library_computes_differently_is_refused(tiny_text, tmp_path):
    # transformers' mean pooling loses one direction, and this projection reads all alike
    model = with_text(tiny_vit(embed_dim=48), tiny_text)
    torch.nn.init.orthogonal_(model.text.encoder.projection.weight)
    with pytest.raises(UsageError, match="transformers cannot express this model: cosine"):
        export_model(model, "transformers", 28, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_default_towers_go_to_open_clip(tmp_path):
    torch.manual_seed(0)
    model = with_text(load_vision_tower("dinov2s"), "minilm")
    assert min(export_model(model, "open_clip", 56, tmp_path / "out")) >= MIN_COSINE


@pytest.mark.parametrize(
    ("to", "patch_size", "pooling", "sentence"),
    [
        ("onnx", 15, "mean", "patch size 15 does not divide .* allowed at 56 px: 28, 14"),
        ("open_clip", 28, "eos", "open_clip cannot pool .* by 'eos'; allowed: mean, cls"),
        ("transformers", 28, "eos", "transformers cannot pool .* by 'eos' .* by mean or cls"),
    ],
)
def test_what_a_format_cannot_express_is_one_sentence(
    to, patch_size, pooling, sentence, tiny_text, tmp_path
):
    model = with_text(tiny_vit(), tiny_text, pooling)
    with pytest.raises(UsageError, match=sentence):
        export_model(model, to, patch_size, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_stops_an_export_to_timm_leaves_nothing(tmp_path, monkeypatch):
    def write_half(net, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("contrastive.export.timm.save_for_hf", write_half)
    with pytest.raises(KeyboardInterrupt):
        export_timm(tiny_vit(), 28, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_inside_a_file_is_refused_before_a_model_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file/x")
    flags = ["--model", "none", "--to", "timm", "--patch-size", "28", "--out", out]
    monkeypatch.setattr(sys, "argv", ["export.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "launch/export.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "file cannot be a folder: File exists" in capsys.readouterr().err


def test_register_tokens_have_no_place_in_open_clip(tiny_text, tmp_path):
    with pytest.raises(UsageError, match="it has 5 prefix tokens, open_clip's ViT one"):
        export_model(
            with_text(tiny_vit(reg_tokens=4), tiny_text), "open_clip", 28, tmp_path / "out"
        )
