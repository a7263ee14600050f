"""CLIP and SigLIP checkpoints of other libraries as whole models."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from test_towers import OWN_VIT, PICTURES, SMALL, make_open_clip

from contrastive import LitModel, load_vision_tower
from contrastive.export.export_model import export_model
from contrastive.files import open_clip as open_clip_files
from contrastive.text.config import TextConfig
from contrastive.text.load import load_text_tower
from data.errors import UsageError
from retrieval import Searcher
from retrieval.photos.indexing import index_photos

TEXTS = ["a red dog", "two cats in the rain that nobody has asked for", "!", "Boats, at NIGHT"]
MIN_COSINE = 0.9999


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(96, 64), (64, 130), (200, 200), (65, 40)]):
        coarse = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number}.png"
        )
    return folder


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert F.cosine_similarity(ours, theirs).min() >= MIN_COSINE


def assert_album(spec: str, pictures: Path, folder: Path) -> None:
    """It makes an album, which is searched by words and by pictures."""
    index_photos(pictures, spec, folder, num_workers=0, device="cpu")
    searcher = Searcher.load(folder, device="cpu")
    by_picture, by_words = searcher.search([str(pictures / "2.png"), TEXTS[0]], k=4)
    assert by_picture[0].key == "2.png"
    assert by_picture[0].similarity == pytest.approx(1, abs=1e-4)
    model = LitModel.from_pretrained(spec)
    files = [pictures / hit.key for hit in by_words]
    wanted = model.encode_image(files) @ model.encode_text(TEXTS[:1]).T
    assert [hit.similarity for hit in by_words] == pytest.approx(wanted[:, 0].tolist(), abs=1e-4)


def with_tokenizer(
    folder: Path, tiny_text: str, **special: str
) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:"), **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- open_clip -------------------------------------------------------------------------------


def biased(folder: Path, tiny_text: str) -> None:
    """SigLIP as open_clip has it: a tokenizer of transformers, no causal mask, a biased projection,
    images squashed."""
    with_tokenizer(folder, tiny_text)
    text = {
        "context_length": 12, "vocab_size": 2000, "width": 32, "heads": 2, "layers": 2,
        "hf_tokenizer_name": "nobody/nothing", "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    }  # fmt: skip
    config = {
        "embed_dim": 24, "vision_cfg": OWN_VIT, "text_cfg": text, "custom_text": True,
        "init_logit_bias": -10.0,
    }  # fmt: skip
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    pixels["interpolation"] = "bicubic"
    facts = {"model_cfg": config, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.nn.init.normal_(model.text.text_projection.bias)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def with_encoder(folder: Path, tiny_text: str, projection: str) -> None:
    """CLIP with a BERT of transformers, whose configuration lies in the folder."""
    with_tokenizer(folder, tiny_text)
    transformers.AutoConfig.from_pretrained(tiny_text.removeprefix("hf:")).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder), "hf_tokenizer_name": "nobody/nothing", "context_length": 14,
        "hf_pooler_type": "mean_pooler", "hf_proj_type": projection, "hf_model_pretrained": False,
    }  # fmt: skip
    config = {"embed_dim": 24, "vision_cfg": OWN_VIT, "text_cfg": text, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_hf=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert linear", "bert mlp", "odd side"])
def test_a_model_of_open_clip_embeds_as_open_clip_does(kind, tiny_text, pictures, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "clip":
        make_open_clip(folder, OWN_VIT)
    elif kind == "odd side":  # four patches a side, and 8 pixels that are not read
        make_open_clip(folder, {**OWN_VIT, "image_size": 72})
    elif kind == "siglip":
        biased(folder, tiny_text)
    else:
        with_encoder(folder, tiny_text, kind.removeprefix("bert "))
    spec = f"local-dir:{folder}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(spec)
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(spec)
    ours = LitModel.from_pretrained(f"open_clip:{spec}")
    files = sorted(pictures.iterdir())
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(file)) for file in files])
        assert_same(ours.encode_image(files, 16), theirs.encode_image(images))
        assert_same(ours.encode_text(TEXTS), theirs.encode_text(tokenizer(TEXTS)))
    torch.testing.assert_close(ours.text.scale(), theirs.logit_scale.exp())
    assert ours.text.loss.kind == ("sigmoid" if kind == "siglip" else "softmax")
    assert ours.patch_sizes == (16,)
    assert_album(f"open_clip:{spec}", pictures, tmp_path / "album")
    ours.save_pretrained(tmp_path / "ours")
    again = LitModel.from_pretrained(tmp_path / "ours")
    assert again.image_fingerprint == ours.image_fingerprint
    torch.testing.assert_close(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    torch.testing.assert_close(again.encode_image(files, 8), ours.encode_image(files, 8))

    least = export_model(again, "open_clip", 16, tmp_path / "back")  # compares all embeddings
    assert min(least) > MIN_COSINE


def test_an_encoder_of_transformers_has_the_dropout_that_is_asked_for(tiny_text, tmp_path):
    with_encoder(tmp_path, tiny_text, "linear")
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text()) | {"hidden_dropout_prob": 0.1}
    file.write_text(json.dumps(facts | {"attention_probs_dropout_prob": 0.1}))
    for asked in (0.0, 0.3):
        cfg = TextConfig(f"open_clip:local-dir:{tmp_path}", dropout=asked)
        tower = load_text_tower(cfg)
        found = {m.p for m in tower.modules() if isinstance(m, torch.nn.Dropout)}
        assert found == {asked}
        assert tower.can_pack == (asked == 0)


def test_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    make_open_clip(tmp_path, OWN_VIT)
    read = []
    whole = open_clip_files.read_weights
    monkeypatch.setattr(
        open_clip_files, "read_weights", lambda file: read.append(file) or whole(file)
    )
    LitModel.from_pretrained(f"open_clip:local-dir:{tmp_path}")
    assert len(read) == 1


def test_no_weight_is_left_as_the_memory_was(tiny_model, tmp_path):
    """Random weights are not drawn where weights are read, so all must be."""
    tiny_model.save_pretrained(tmp_path / "own")
    make_open_clip(tmp_path / "clip", OWN_VIT)
    clip = f"open_clip:local-dir:{tmp_path / 'clip'}"
    LitModel.from_pretrained(clip).save_pretrained(tmp_path / "saved")
    for spec in (tmp_path / "own", clip, tmp_path / "saved"):
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
        try:
            model = LitModel.from_pretrained(spec)
        finally:
            torch.use_deterministic_algorithms(False)
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert [name for name, values in held.items() if values.isnan().any()] == []


def test_a_projected_tower_is_exported_with_an_affine_of_its_own(tmp_path):
    torch.manual_seed(0)
    make_open_clip(tmp_path / "clip", {**OWN_VIT, "width": 48})
    model = LitModel.from_pretrained(f"open_clip:local-dir:{tmp_path / 'clip'}")
    model.feature_mean += torch.randn(24)
    model.feature_whiten += 0.3 * torch.randn(24, 24)
    for size in (16, 32):
        assert min(export_model(model, "open_clip", size, tmp_path / f"{size}")) > MIN_COSINE


# ---- transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_of_transformers_embeds_as_transformers_does(kind, tiny_text, pictures, tmp_path):
    torch.manual_seed(0)
    tokenizer = with_tokenizer(tmp_path, tiny_text)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id}
    towers = {"text_config": text, "vision_config": {**SMALL, **PICTURES}}
    theirs: transformers.PreTrainedModel
    if kind == "clip":
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=24))
    else:
        theirs = transformers.SiglipModel(transformers.SiglipConfig(**towers))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    cls = transformers.CLIPImageProcessor if kind == "clip" else transformers.SiglipImageProcessor
    processor = (
        cls(size={"shortest_edge": 64}, crop_size=size) if kind == "clip" else cls(size=size)
    )
    processor.save_pretrained(tmp_path)
    ours = LitModel.from_pretrained(f"transformers:{tmp_path}")
    files = sorted(pictures.iterdir())[
        :2
    ]  # without an odd margin, which transformers crops elsewhere
    padding = {"padding": "max_length" if kind == "siglip" else True, "max_length": 16}
    tokens = tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
    with torch.no_grad():
        pixels = processor([Image.open(f) for f in files], return_tensors="pt")["pixel_values"]
        assert_same(ours.encode_image(files, 16), theirs.get_image_features(pixels).pooler_output)
        wanted = theirs.get_text_features(tokens["input_ids"]).pooler_output
        assert_same(ours.encode_text(TEXTS), wanted)
    assert ours.text.encoder.tower.tokenizer.context_length == 16
    assert_album(f"transformers:{tmp_path}", pictures, tmp_path / "album")
    ours.save_pretrained(tmp_path / "ours")
    again = LitModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    assert again.image_fingerprint == ours.image_fingerprint


@pytest.mark.parametrize("num_patches", [16, 36])
def test_naflex_models_embed_squares_as_transformers_does(
    num_patches, tiny_text, pictures, tmp_path
):
    """SigLIP 2's, with the budget of patches that they were trained at, and with another."""
    torch.manual_seed(0)
    tokenizer = with_tokenizer(tmp_path, tiny_text)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**SMALL, "patch_size": 16, "num_patches": 16}
    theirs = transformers.Siglip2Model(
        transformers.Siglip2Config(text_config=text, vision_config=vision)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    processor = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=num_patches)
    processor.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)  # of SigLIP 2's own kind
    side = 16 * math.isqrt(num_patches)
    noise = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    tokens = tokenizer(TEXTS, truncation=True, padding="max_length", max_length=16)
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt")
        wanted = theirs.get_image_features(**pixels).pooler_output
        texts = theirs.get_text_features(torch.tensor(tokens["input_ids"])).pooler_output
    ours = LitModel.from_pretrained(f"transformers:{tmp_path}")
    assert ours.patch_sizes == (16,)
    assert_same(ours.encode_image(images), wanted)
    assert_same(ours.encode_text(TEXTS), texts)
    assert_album(f"transformers:{tmp_path}", pictures, tmp_path / "album")
    ours.save_pretrained(tmp_path / "ours")
    again = LitModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.encode_image(images), ours.encode_image(images))
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    tower = load_vision_tower(f"transformers:{tmp_path}")
    assert {8, 16} <= set(tower.patch_sizes)


def test_another_resizing_of_transformers_is_said(tmp_path, capsys):
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=SMALL, vision_config={**SMALL, **PICTURES})
    )
    theirs.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    transformers.SiglipImageProcessor(size=size, resample=2).save_pretrained(tmp_path)
    capsys.readouterr()
    load_vision_tower(f"transformers:{tmp_path}")
    assert "resizes images by bilinear, here bicubic\n" in capsys.readouterr().err


def test_an_odd_side_of_transformers_is_read_as_transformers_does(tmp_path):
    torch.manual_seed(0)
    pictures = {"image_size": 70, "patch_size": 16}
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=SMALL, vision_config={**SMALL, **pictures})
    ).eval()
    theirs.save_pretrained(tmp_path)
    tower = load_vision_tower(f"transformers:{tmp_path}")
    assert tower.patch_sizes == (16, 14, 10, 7, 5)
    assert tower.own_patch_size == 16
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert_same(tower(images, 16), theirs.get_image_features(images).pooler_output)
        assert tower(images, 14).shape == tower(images, 16).shape
        assert tower.to(torch.bfloat16)(images, 16).isfinite().all()  # patches cut by hand
    with pytest.raises(UsageError, match="patch size 15 does not divide the image side of 70 px"):
        tower(images, 15)


# ---- use -------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_searched_with_a_checkpoint(pictures, tmp_path):
    make_open_clip(tmp_path / "clip", OWN_VIT)
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    index_photos(pictures, spec, tmp_path / "index")
    searcher = Searcher.load(tmp_path / "index")
    assert searcher.patch_sizes == (16,)  # the only one that it was trained at
    (hits,) = searcher.search([str(pictures / "2.png")], k=1)
    assert hits[0].key == "2.png"
    assert index_photos(pictures, spec, tmp_path / "index").unchanged == 4
    index_photos(pictures, spec, tmp_path / "coarse", patch_sizes=(32,))
    assert Searcher.load(tmp_path / "coarse").patch_sizes == (32,)


# ---- what is refused -------------------------------------------------------------------------


def test_a_checkpoint_without_texts_is_no_model(tmp_path):
    make_open_clip(tmp_path, OWN_VIT)
    facts = tmp_path / "open_clip_config.json"
    weights = tmp_path / "open_clip_model.safetensors"
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    kept = {k: v.clone() for k, v in model.state_dict().items() if k != "logit_scale"}
    save_file(kept, weights)
    assert facts.is_file()
    with pytest.raises(UsageError, match="allowed as a model: a whole CLIP or SigLIP"):
        LitModel.from_pretrained(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("open_clip:ViT-B-32", "names no weights; allowed: open_clip:ViT-B-32@FILE, or one of"),
        ("open_clip:ViT-B-32@laion2b_s34b_b79k", "cannot download open_clip:ViT-B-32@laion2b"),
        (
            "open_clip:ViT-B-32@nothing.pt",
            "no such file: nothing.pt, nor is it a tag of .*openai, ",
        ),
        ("open_clip:hf-hub:timm/ViT-B-16-SigLIP", "allowed: open_clip:ARCHITECTURE@TAG"),
        ("open_clip:nobody@x", "unknown open_clip architecture 'nobody'"),
        ("transformers:/nothing/here", "cannot load image tower transformers:/nothing/here"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(spec, says):
    with pytest.raises(UsageError, match=says):
        LitModel.from_pretrained(spec)
