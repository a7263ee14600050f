"""The model: unit norms, batching, saving, and the text towers it can carry."""

import hashlib
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from test_towers import OWN_VIT, make_open_clip

from contrastive import LitModel
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.open_clip import OpenClipTextTower
from contrastive.text.padding import TokenBatch, padding_mask
from contrastive.text.tokenizers import OpenClipTokenizer
from data.errors import UsageError
from data.token_ids import TokenIds

TEXTS = ["a red bicycle", "two dogs", "a cat and then many more words than the others have"]


def test_embeddings_have_unit_norm_at_every_patch_size(tiny_model):
    images = torch.randn(2, 3, 240, 240)
    for patch_size in tiny_model.patch_sizes:
        norms = tiny_model.encode_image(images, patch_size=patch_size).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(2))
    torch.testing.assert_close(tiny_model.encode_text(TEXTS).norm(dim=-1), torch.ones(3))


def test_pictures_of_any_shape_are_taken(tiny_model):
    pictures = [Image.new("RGB", (300, 200), "red"), Image.new("L", (50, 260), 7)]
    embeds = tiny_model.encode_image(pictures, patch_size=48)
    pixels = torch.stack([tiny_model.transform(p) for p in pictures])
    torch.testing.assert_close(embeds, tiny_model.encode_image(pixels, patch_size=48))


def test_unequal_lengths_in_a_batch_do_not_change_an_embedding(tiny_model):
    together = tiny_model.encode_text(TEXTS)
    alone = torch.cat([tiny_model.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_texts_longer_than_the_context_are_told(tiny_model):
    tokenizer = tiny_model.text.encoder.tower.tokenizer
    fits = "a " * (tokenizer.context_length - 2)
    assert tiny_model.cut_texts(["a cat", fits, fits + "a", ""]) == [False, False, True, False]
    assert tiny_model.cut_texts([]) == []
    assert OpenClipTokenizer("any", 8).cut(["a " * 6, "a " * 7, ""]) == [False, True, False]


def test_encoding_leaves_the_training_mode_alone(tiny_model):
    tiny_model.text.train()
    tiny_model.encode_text(["a cat"])
    assert tiny_model.text.training
    assert not tiny_model.vision.training
    tiny_model.eval()


@pytest.mark.parametrize("pooling", ["cls", "mean", "eos"])
def test_saved_model_loads_equal(pooling, tiny_model, tiny_text, tmp_path):
    tower = load_text_tower(TextConfig(tower=tiny_text, pooling=pooling))
    text = TextSide(TextEncoder(tower, tiny_model.embed_dim), LossConfig(kind="softmax"))
    model = LitModel(tiny_model.vision, text).eval()
    model.feature_mean.normal_()
    model.save_pretrained(tmp_path / "model")
    again = LitModel.from_pretrained(tmp_path / "model")
    images = torch.randn(2, 3, 240, 240)
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert torch.equal(again.encode_image(images, 48), model.encode_image(images, 48))
    assert again.image_fingerprint == model.image_fingerprint
    assert again.text_fingerprint == model.text_fingerprint
    assert again.patch_sizes == model.patch_sizes
    assert not list((tmp_path / "model").glob("*.bin"))


def test_open_clip_text_tower_saves_and_loads(tiny_model, tmp_path):
    tower = load_text_tower(TextConfig(tower="open_clip:ViT-S-32-alt", context_length=16))
    model = LitModel(tiny_model.vision, TextSide(TextEncoder(tower, 32), LossConfig())).eval()
    model.save_pretrained(tmp_path / "model")
    again = LitModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    torch.testing.assert_close(
        model.encode_text(TEXTS)[:1], model.encode_text(TEXTS[:1]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("facts", "short"), [({}, True), ({"no_causal_mask": True, "pool_type": "last"}, False)]
)
def test_open_clip_texts_cost_what_they_are_long(facts, short):
    """Unless the tower reads padding, as SigLIP's does."""
    model = open_clip.get_model_config("ViT-S-32-alt")
    model["text_cfg"] |= facts
    torch.manual_seed(0)
    tower = OpenClipTextTower("ViT-S-32-alt", 77, model).eval()
    ids = TokenIds.of(tower.tokenizer(["a dog", "a red dog that runs"]))
    groups = TokenBatch.of(tower, ids, 2).groups
    assert [group.ids.shape[1] for group in groups] == ([4, 7] if short else [77, 77])
    with torch.no_grad():
        whole = tower.net(open_clip.tokenize(["a dog", "a red dog that runs"], 77))
        torch.testing.assert_close(tower(groups), whole, rtol=1e-5, atol=1e-5)


TRICKY = ["new!(2024)", "a!!b c", "it's!", "!", "", "a <end_of_text> b!(", "x!(" * 30]
"""open_clip's padding has the id of the "!" that begins a longer token."""


def test_open_clip_texts_read_as_open_clip_reads_them(tmp_path):
    torch.manual_seed(0)
    theirs = make_open_clip(tmp_path / "clip", OWN_VIT)
    tower = load_text_tower(TextConfig(f"open_clip:local-dir:{tmp_path / 'clip'}"))
    padded = open_clip.tokenize(TRICKY, tower.tokenizer.context_length)
    ids = tower.tokenizer(TRICKY)
    for row, own in zip(padded.tolist(), ids, strict=True):
        assert row == own + [0] * (len(row) - len(own))
        assert own[-1] == padded.max()
    encoder = TextEncoder(tower, 24)
    with torch.no_grad():
        expected = theirs.encode_text(padded, normalize=True)
        torch.testing.assert_close(encoder(TokenBatch.of(tower, TokenIds.of(ids))), expected)


def test_token_ids_kept_of_open_clip_before_ends_were_whole_are_not_used(tiny_text):
    """Their names end with the tokenizer's fingerprint; others keep theirs."""
    old = hashlib.blake2b(b"open_clip/ViT-B-32/32", digest_size=8).hexdigest()
    assert OpenClipTokenizer("ViT-B-32", 32).fingerprint != old
    minilm = load_text_tower(TextConfig()).tokenizer
    assert minilm.fingerprint == "4d5c1319877e28e6"


@pytest.mark.parametrize("pad", ["[PAD]", "[SEP]", "[CLS]", "a"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_ids_embed_as_their_texts_whatever_pads_them(pad, side, tiny_model, tiny_text):
    tower = load_text_tower(TextConfig(tower=tiny_text, pooling="eos"))
    model = LitModel(tiny_model.vision, TextSide(TextEncoder(tower, 32), LossConfig())).eval()
    texts = ["two [PAD] dogs", "a red a bicycle", "cat", ""]
    hf = tower.tokenizer.hf
    hf.pad_token, hf.padding_side = pad, side
    padded = hf(texts, padding=True, return_tensors="pt")
    mask = padding_mask(padded["input_ids"], tower.tokenizer)
    assert torch.equal(mask, padded["attention_mask"])
    if side == "right":
        embeds = model.encode_text(padded["input_ids"])
        torch.testing.assert_close(embeds, model.encode_text(texts), rtol=1e-5, atol=1e-6)


def test_text_towers_have_no_dropout_unless_asked(tiny_text):
    assert load_text_tower(TextConfig(tower=tiny_text)).net.config.hidden_dropout_prob == 0
    asked = load_text_tower(TextConfig(tower=tiny_text, dropout=0.3))
    assert asked.net.config.hidden_dropout_prob == 0.3


def test_image_fingerprint_ignores_the_text_tower(tiny_model, tiny_text):
    torch.manual_seed(1)
    text = TextSide(TextEncoder(load_text_tower(TextConfig(tower=tiny_text)), 32), LossConfig())
    other = LitModel(tiny_model.vision, text)
    assert other.image_fingerprint == tiny_model.image_fingerprint
    assert other.text_fingerprint != tiny_model.text_fingerprint
    other.feature_whiten[0, 0] += 1
    assert other.image_fingerprint != tiny_model.image_fingerprint


@pytest.mark.parametrize(
    ("tower", "sentence"),
    [
        ("bert", "unknown text tower 'bert'; allowed: minilm, hf:"),
        ("open_clip:none", "unknown open_clip architecture 'none'"),
        ("hf:/no/such/folder", "cannot load text tower 'hf:/no/such/folder'"),
    ],
)
def test_unknown_text_towers_are_one_sentence(tower, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_text_tower(TextConfig(tower=tower))


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not a model folder"):
        LitModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UsageError, match="format 1"):
        LitModel.from_pretrained(tmp_path)


def test_a_flipped_bit_of_a_saved_model_is_noticed(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    files = [file for file in tmp_path.iterdir() if file.name != "README.md"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        for place in range(len(whole) // 7, len(whole), len(whole) // 5):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UsageError, match=f"{file.name}"):
                LitModel.from_pretrained(tmp_path)
        file.write_bytes(whole)
    (tmp_path / "README.md").write_text("mine")
    LitModel.from_pretrained(tmp_path)


def test_groups_of_like_length_change_no_embedding(tiny_model):
    tower = tiny_model.text.encoder.tower
    ids = TokenIds.of(sorted(tower.tokenizer(TEXTS * 3), key=len))
    whole, *_ = tiny_model.text(TokenBatch.of(tower, ids))
    for num_groups in (2, 4, 12):  # 12: more groups than texts
        tokens = TokenBatch.of(tower, ids, num_groups)
        assert len(tokens.groups) == num_groups
        torch.testing.assert_close(tiny_model.text(tokens)[0], whole, rtol=1e-5, atol=1e-6)


def test_token_ids_are_taken_too(tiny_model):
    tower = tiny_model.text.encoder.tower
    ids = tower.pad(TokenIds.of(tower.tokenizer(TEXTS))).ids
    torch.testing.assert_close(tiny_model.encode_text(ids), tiny_model.encode_text(TEXTS))


def test_frozen_embeddings_take_no_gradient(tiny_text):
    tower = load_text_tower(TextConfig(tower=tiny_text, freeze_embeddings=True))
    frozen = {n for n, p in tower.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("embeddings" in name for name in frozen)


@pytest.mark.parametrize("contents", [b"", b"{", b"{}", b"null"])
def test_a_damaged_tokenizer_is_told_in_one_sentence(
    contents: bytes, tiny_model: LitModel, tiny_text: str, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    shutil.copytree(tiny_text.removeprefix("hf:"), tmp_path / "text")
    for folder, load in (
        (tmp_path / "model", LitModel.from_pretrained),
        (tmp_path / "text", lambda folder: load_text_tower(TextConfig(tower=f"hf:{folder}"))),
    ):
        (folder / "tokenizer.json").write_bytes(contents)
        with pytest.raises(UsageError, match=str(folder)) as error:
            load(folder)
        assert "\n" not in str(error.value)
