"""Image towers of every family: as their library computes them, trained against, saved, used."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from forked import run
from launcher import ROOT
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from contrastive import LitModel, VisionTower, load_vision_tower
from contrastive.export.timm import export_timm, timm_net
from contrastive.flexify.config import StudentConfig, TeacherConfig
from contrastive.flexify.student import build_student
from contrastive.model.config import LossConfig
from contrastive.model.loss import Positives, loss_share
from contrastive.model.text_side import TextSide
from contrastive.run.config import OptimConfig
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.padding import TokenBatch
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.config import VisionConfig
from contrastive.vision.delta_file import save_delta
from contrastive.vision.formats.own_format import save_vision_tower
from data.config import DataConfig
from data.errors import UsageError
from data.token_ids import TokenIds
from retrieval import ZeroShotClassifier

Forward = Callable[[torch.Tensor], torch.Tensor]
TEXTS = ["a red bicycle", "two dogs", "a happy cat", "smile"]
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


@dataclass
class Library:
    """A small network in its library's own files: how we read it, and what the library gives."""

    spec: str
    forward: Forward
    image_size: int = 64


def of_timm(name: str, size: int = 64, **args) -> Callable[[Path], Library]:
    def build(folder: Path) -> Library:
        net = timm.create_model(name, num_classes=7, **args).eval()
        data = {"input_size": (3, size, size)}
        save_for_hf(net, str(folder), model_args=args, data_config=data, safe_serialization=True)
        return Library(
            f"timm:local-dir:{folder}",
            lambda images: net.forward_head(net.forward_features(images), pre_logits=True),
            size,
        )

    return build


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
PICTURES = {"image_size": 64, "patch_size": 16}


def clip_model() -> transformers.CLIPModel:
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**SMALL, **PICTURES}, projection_dim=24
        )
    )


def siglip_model() -> transformers.SiglipModel:
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SMALL, **PICTURES})
    return transformers.SiglipModel(config)


def of_transformers(make: Callable) -> Callable[[Path], Library]:
    def build(folder: Path) -> Library:
        model = make().eval()
        model.save_pretrained(folder)

        def forward(images: torch.Tensor) -> torch.Tensor:
            if hasattr(model, "get_image_features"):
                return model.get_image_features(pixel_values=images).pooler_output
            return model(images).last_hidden_state.mean((2, 3))

        return Library(f"transformers:{folder}", forward, 64 if make is not mit else 224)

    return build


def mit() -> transformers.SegformerModel:
    return transformers.SegformerModel(
        transformers.SegformerConfig(hidden_sizes=[8, 16, 20, 32], depths=[1, 1, 1, 1])
    )


def of_open_clip(vision: dict, **more) -> Callable[[Path], Library]:
    def build(folder: Path) -> Library:
        model = make_open_clip(folder, vision, **more)
        return Library(f"open_clip:local-dir:{folder}", model.encode_image)

    return build


def make_open_clip(folder: Path, vision: dict, **more) -> open_clip.CLIP:
    """A model of open_clip's factory, with random weights, and its folder."""
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **more}
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": pixels})
    )
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


OWN_VIT = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TRUNK = {"image_size": 224, "timm_pool": "", "timm_proj": "linear"}


def of_cct(folder: Path) -> Library:
    from vit_pytorch.cct import cct_2

    net = cct_2(img_size=64, n_conv_layers=2, kernel_size=3, num_classes=5).eval()
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / "cct.safetensors")
    net.classifier.fc = torch.nn.Identity()
    return Library(f"vit_pytorch:cct_2@{folder / 'cct.safetensors'}", net)


SMALL_ONES: dict[str, Callable[[Path], Library]] = {
    "ViT, AugReg ViT": of_timm("vit_tiny_patch16_224", **VIT),
    "DeiT, distilled": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "CaiT": of_timm("cait_xxs24_224", **VIT),
    "EVA-02": of_timm("eva02_tiny_patch14_224", **VIT),
    "DINOv2": of_timm("vit_small_patch14_dinov2", **VIT),
    "DINOv2 with registers": of_timm("vit_small_patch14_reg4_dinov2", **VIT),
    "SigLIP": of_timm("vit_base_patch16_siglip_224", **VIT),
    "NaFlexViT": of_timm(
        "naflexvit_base_patch16_gap", patch_size=16, embed_dim=32, depth=2, num_heads=2
    ),
    "CLIP": of_transformers(clip_model),
    "SigLIP of transformers": of_transformers(siglip_model),
    "CLIP of open_clip": of_open_clip(OWN_VIT),
    "MViTv2": of_timm("mvitv2_tiny", img_size=64),
    "XCiT": of_timm("xcit_nano_12_p16_224", img_size=64, embed_dim=32, depth=1, num_heads=2),
    "MLP-Mixer": of_timm("mixer_s32_224", img_size=64),
    "ConvMixer": of_timm("convmixer_768_32", size=56),
    "ResNet": of_timm("resnet10t"),
    "ConvNeXt": of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
    "Swin": of_timm(
        "swin_tiny_patch4_window7_224",
        img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
    ),
    "SegFormer's encoder (MiT)": of_transformers(mit),
    "CCT": of_cct,
    # variants of the same families
    "DINOv3": of_timm("vit_small_patch16_dinov3", **VIT),
    "EVA without a reference grid": of_timm("eva02_tiny_patch14_224", ref_feat_shape=None, **VIT),
    "NaFlexViT, two lines of positions": of_timm(
        "naflexvit_base_patch16_parfac_gap", patch_size=16, embed_dim=32, depth=2, num_heads=2
    ),
    "CLIP of open_clip, QuickGELU, mean": of_open_clip(
        {**OWN_VIT, "pool_type": "avg", "ls_init_value": 0.1}, quick_gelu=True
    ),
    "CLIP of open_clip, ResNet": of_open_clip(
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}
    ),
    "CoCa's image tower": of_open_clip({**OWN_VIT, "attentional_pool": True}),
}  # fmt: skip
FLEXIBLE = set(SMALL_ONES) - {
    "MViTv2", "XCiT", "MLP-Mixer", "ConvMixer", "ResNet", "ConvNeXt", "Swin",
    "SegFormer's encoder (MiT)", "CCT", "CLIP of open_clip, ResNet", "CoCa's image tower",
}  # fmt: skip


@pytest.fixture(params=SMALL_ONES)
def small(request, tmp_path) -> tuple[str, Library, VisionTower]:
    torch.manual_seed(0)
    library = SMALL_ONES[request.param](tmp_path / "library")
    return request.param, library, load_vision_tower(library.spec)


def test_every_family_trains_saves_loads_embeds_and_classifies(small, tiny_text, tmp_path):
    name, library, tower = small
    images = torch.randn(4, 3, library.image_size, library.image_size)
    with torch.no_grad():
        expected = library.forward(images)
    own = tower.native_patch_size
    torch.testing.assert_close(tower(images, own), expected, rtol=1e-5, atol=1e-5)
    assert tower.image_size == library.image_size
    assert tower.embed_dim == expected.shape[1]
    assert tower.flexible == (name in FLEXIBLE)
    assert tower.num_tokens(own) >= (library.image_size // own) ** 2
    if not tower.flexible:
        with pytest.raises(UsageError, match=rf"cannot change its patch size; allowed: {own}$"):
            tower(images, own + 1)
        with pytest.raises(UsageError, match="cannot leave out patches; allowed: keep 1"):
            tower(images, own, 0.5)
        with pytest.raises(UsageError, match=r"height 64 and width \d+ px: .* reads squares alone"):
            tower(images.new_zeros(1, 3, 64, 2 * library.image_size), own)
    sizes = (own, 2 * own) if tower.flexible else (own,)

    encoder = TextEncoder(load_text_tower(TextConfig(tower=tiny_text)), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig()))
    tokens = TokenBatch.of(encoder.tower, TokenIds.of(encoder.tower.tokenizer(TEXTS)))
    pairs = Positives(torch.arange(4), torch.arange(4))
    optimizer = torch.optim.AdamW(model.text.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        embeds = model.encode_image(images, sizes[-1])
        text_embeds, scale, bias = model.text(tokens)
        loss = loss_share("sigmoid", embeds, text_embeds, pairs, scale, bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    torch.testing.assert_close(tower(images, own), expected, rtol=1e-5, atol=1e-5)

    model.eval().save_pretrained(tmp_path / "model")
    again = LitModel.from_pretrained(tmp_path / "model")
    assert again.image_fingerprint == model.image_fingerprint
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 70, 3), np.uint8))
        for i in range(3)
    ]
    for size in sizes:
        embeds = again.encode_image(pictures, size)
        assert torch.equal(embeds, model.encode_image(pictures, size))
        classes, _ = ZeroShotClassifier(again, ["dog", "cat"], ["a {c}"]).predict(pictures, size)
        assert classes.shape == (3, 2)
    save_vision_tower(tower, tmp_path / "tower")
    assert load_vision_tower(str(tmp_path / "tower")).fingerprint == tower.fingerprint


@pytest.mark.parametrize("name", sorted(FLEXIBLE))
def test_flexible_towers_keep_stems_and_drop_patches(name, tmp_path, monkeypatch):
    tower = load_vision_tower(SMALL_ONES[name](tmp_path / "library").spec)
    images = torch.randn(2, 3, 64, 64)
    coarse = tower(images, 32)
    everything = torch.arange(4).expand(2, -1)
    torch.testing.assert_close(tower(images, 32, everything), coarse)
    assert not torch.allclose(tower(images, 32, 0.5), coarse, atol=1e-6)
    monkeypatch.setattr("contrastive.vision.stems.resized_stem", lambda *_: pytest.fail("again"))
    assert torch.equal(tower(images, 32), coarse)


@pytest.mark.parametrize("name", sorted(FLEXIBLE))
def test_enlarged_pictures_and_patches_look_alike(name, tmp_path):
    """PI-resize's promise, on pictures enlarged as it assumes: the tokens are the same."""
    tower = load_vision_tower(SMALL_ONES[name](tmp_path / "library").spec)
    for rows, columns in ((4, 4), (2, 5), (7, 1)):
        patches = torch.randn(rows * columns, 3, 16, 16)
        large = torch.nn.functional.interpolate(patches, (32, 32), mode="bilinear")
        torch.testing.assert_close(
            tower(picture_of(large, rows), 32),
            tower(picture_of(patches, rows), 16),
            rtol=1e-4,
            atol=1e-4,
        )


def picture_of(patches: torch.Tensor, rows: int) -> torch.Tensor:
    """(1, 3, h, w) of patches (n, 3, p, p), row by row."""
    p = patches.shape[-1]
    cells = patches.unflatten(0, (rows, -1)).permute(2, 0, 3, 1, 4)
    return cells.reshape(1, 3, rows * p, -1)


def test_the_documentation_says_which_families_are_flexible():
    program = [str(ROOT / "benchmarks" / "tower_families.py"), "--table"]
    table = run(*program).stdout
    families = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]}
    assert families <= set(SMALL_ONES)
    page = ROOT / "docs" / "towers.md"
    assert table in page.read_text(), " ".join(program)


# ---- import: the checkpoint's own joint space ------------------------------------------------


def cosines(spec: str, text: str, images: torch.Tensor, save: bool = True) -> torch.Tensor:
    """Of images and TEXTS, by a model that is built from two specs and never trained."""
    tower = load_vision_tower(spec)
    text_tower = load_text_tower(TextConfig(tower=text, context_length=16))
    encoder = TextEncoder(text_tower, tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig())).eval()
    if save:
        model.save_pretrained("imported")
        again = LitModel.from_pretrained("imported")
        assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    return model.encode_image(images, tower.native_patch_size) @ model.encode_text(TEXTS).T


@pytest.mark.parametrize(
    ("vision", "more"),
    [
        (OWN_VIT, {}),
        ({**OWN_VIT, "pool_type": "avg"}, {"quick_gelu": True}),
        ({**TRUNK, "timm_model_name": "vit_tiny_patch16_224"}, {}),
        ({**TRUNK, "timm_model_name": "convnext_atto"}, {}),
        ({**TRUNK, "timm_model_name": "resnet10t", "timm_proj": "mlp"}, {}),
    ],
)
def test_an_open_clip_model_keeps_its_space(vision, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = make_open_clip(tmp_path / "theirs", vision, **more)
    spec = f"open_clip:local-dir:{tmp_path / 'theirs'}"
    tower = load_vision_tower(spec)
    assert (tower.mean, tower.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert tower.flexible == ("resnet" not in str(vision) and "conv" not in str(vision))
    images = torch.randn(3, 3, vision["image_size"], vision["image_size"])
    with torch.no_grad():
        expected = theirs.encode_image(images, normalize=True)
        ids = open_clip.tokenize(TEXTS, 16)
        expected = expected @ theirs.encode_text(ids, normalize=True).T
    torch.testing.assert_close(cosines(spec, spec, images), expected, rtol=1e-5, atol=1e-5)


def test_an_architecture_and_its_file_are_a_checkpoint_too(tmp_path):
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "epoch_1.pt")
    spec = f"open_clip:ViT-S-32-alt@{tmp_path / 'epoch_1.pt'}"
    images = torch.randn(2, 3, 224, 224)
    assert load_vision_tower(spec).mean == open_clip.OPENAI_DATASET_MEAN
    with torch.no_grad():
        expected = theirs.encode_image(images, normalize=True)
        expected = expected @ theirs.encode_text(open_clip.tokenize(TEXTS), normalize=True).T
    got = cosines(spec, spec, images, save=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [clip_model, siglip_model])
def test_a_model_of_transformers_keeps_its_space(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = make().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(tmp_path / "theirs")
    images = torch.randn(3, 3, 64, 64)
    padding = "max_length" if make is siglip_model else True
    ids = tokenizer(TEXTS, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs(input_ids=ids["input_ids"], pixel_values=images)
        expected = out.image_embeds @ out.text_embeds.T
    got = cosines(f"transformers:{tmp_path / 'theirs'}", f"hf:{tmp_path / 'theirs'}", images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_imported_pair_trains_from_its_own_space(emoji_shards, tmp_path):
    """Through the trainer: with init_samples=0 small steps stay near the checkpoint."""
    torch.manual_seed(0)
    make_open_clip(tmp_path / "clip", OWN_VIT)
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    cfg = TrainConfig(
        out=str(tmp_path),
        data=DataConfig(shards=(f"{emoji_shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=spec, patch_sizes=(32, 16)),
        text=TextConfig(tower=spec, context_length=16),
        optim=OptimConfig(lr=1e-5),
        global_batch_size=8,
        init_samples=0,
        steps=2,
        log_every=1,
    )
    folder = train(cfg)
    trained = LitModel.from_pretrained(folder / "model")
    tower = load_vision_tower(spec)
    assert trained.vision.fingerprint == tower.fingerprint
    encoder = TextEncoder(load_text_tower(cfg.text), tower.embed_dim)
    start = LitModel(tower, TextSide(encoder, LossConfig())).eval()
    agreement = (trained.encode_text(TEXTS) * start.encode_text(TEXTS)).sum(1)
    assert (agreement > 0.95).all()
    assert not torch.equal(trained.encode_text(TEXTS), start.encode_text(TEXTS))


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *"abcdefghij"])}
    words["[SEP]"] = 59  # clip_model's end token
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("timm:local-dir:absent", "absent is not a timm folder"),
        ("open_clip:ViT-B-33@x", "unknown open_clip architecture 'ViT-B-33'; close names: ViT-B"),
        ("open_clip:ViT-B-32", "names no weights; allowed: open_clip:ViT-B-32@FILE"),
        ("open_clip:ViT-B-32@absent.pt", "no such file: absent.pt"),
        ("open_clip:local-dir:absent", "absent is not an open_clip folder"),
        ("transformers:/absent", "cannot load image tower transformers:/absent"),
        ("vit_pytorch:cct_3@x", "allowed: vit_pytorch:NAME@FILE with NAME one of cct_2"),
        ("vit_pytorch:cct_2@absent.pt", "no such file: absent.pt"),
    ],
)
def test_unknown_sources_are_one_sentence(spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_vision_tower(spec)


def test_checkpoints_of_something_else_are_one_sentence(tiny_text, tmp_path):
    bert = tiny_text.removeprefix("hf:")
    with pytest.raises(UsageError, match="is of type bert; allowed: clip, siglip"):
        load_vision_tower(f"transformers:{bert}")
    clip = clip_model()
    clip.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError, match="is of type clip_text_model; allowed: clip"):
        load_vision_tower(f"transformers:{tmp_path / 'text'}")
    clip.save_pretrained(tmp_path / "part")
    weights = {k: v for k, v in clip.state_dict().items() if "layers.1" not in k}
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="lacks weights of CLIPVisionModel"):
        load_vision_tower(f"transformers:{tmp_path / 'part'}")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for spec in ("open_clip:ViT-S-32-alt", "vit_pytorch:cct_2", "timm:vit_tiny_patch16_224"):
        with pytest.raises(UsageError, match="weights of another model"):
            load_vision_tower(f"{spec}@{tmp_path / 'x.safetensors'}")
    with pytest.raises(UsageError, match="weights of another model"):
        load_text_tower(TextConfig(tower=f"open_clip:ViT-S-32-alt@{tmp_path / 'x.safetensors'}"))


PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read: .*JSON"),
        (json.dumps({**PROCESSOR, "do_normalize": False}), "has do_normalize False; allowed: True"),
        (json.dumps({**PROCESSOR, "do_rescale": False}), "has do_rescale False; allowed: True"),
        (json.dumps({**PROCESSOR, "rescale_factor": 1}), r"has rescale_factor 1; allowed: 0\.0039"),
        (json.dumps({**PROCESSOR, "image_mean": [0.5]}), r"is .*0\.5.*; allowed: three numbers"),
        (json.dumps({**PROCESSOR, "image_std": "x"}), "is x; allowed: three numbers"),
    ],
)
def test_pixels_that_we_cannot_give_are_refused(text, sentence, tmp_path):
    spec = of_transformers(clip_model)(tmp_path).spec
    assert load_vision_tower(spec).mean == open_clip.OPENAI_DATASET_MEAN
    own = {**PROCESSOR, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    tower = load_vision_tower(spec)
    assert (tower.mean, tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_vision_tower(spec)


def test_another_resizing_of_open_clip_is_said_and_a_grey_mean_refused(tmp_path, capsys):
    make_open_clip(tmp_path, OWN_VIT)
    spec, file = f"open_clip:local-dir:{tmp_path}", tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    load_vision_tower(spec)
    assert "resizes" not in capsys.readouterr().err
    pixels = {"resize_mode": "squash", "interpolation": "bilinear"}
    file.write_text(json.dumps({**config, "preprocess_cfg": pixels}))
    load_vision_tower(spec)
    said = capsys.readouterr().err
    assert said == f"{spec} resizes images by squash bilinear, here squash bicubic\n"
    file.write_text(json.dumps({**config, "preprocess_cfg": {"mean": [0.5]}}))
    with pytest.raises(UsageError, match=r"mean of .* is \[0\.5\]; allowed: three numbers"):
        load_vision_tower(spec)


def test_a_projection_is_kept_or_refused(tmp_path):
    torch.manual_seed(0)
    spec = of_transformers(clip_model)(tmp_path / "clip").spec
    tower, images = load_vision_tower(spec), torch.randn(2, 3, 64, 64)
    student = build_student(StudentConfig(), TeacherConfig(tower=spec), 16)
    with torch.no_grad():
        torch.testing.assert_close(student(images, 16), tower(images, 16))
    with pytest.raises(UsageError, match="without a projection"):
        export_timm(tower, 32, tmp_path / "exported")
    with pytest.raises(UsageError, match="ends in a projection, which such a file does not hold"):
        save_delta(student, tower, spec, tmp_path / "changed.safetensors")


def test_only_a_plain_vit_is_a_student_or_handed_on(tmp_path):
    spec = SMALL_ONES["CaiT"](tmp_path / "cait").spec
    with pytest.raises(UsageError, match="cannot be made flexible by training"):
        build_student(StudentConfig(tower=spec), TeacherConfig(), 16)
    with pytest.raises(UsageError, match=r"exported; allowed: .* plain ViTs$"):
        timm_net(load_vision_tower(spec), 32, projected=True)
    with pytest.raises(UsageError, match="cait_xxs24_224 cannot be exported"):
        export_timm(load_vision_tower(spec), 32, tmp_path / "exported")


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    spec = of_cct(tmp_path / "cct").spec
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)
    with pytest.raises(UsageError, match="run: pip install vit-pytorch"):
        load_vision_tower(spec)
