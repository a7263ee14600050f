"""An image head: it starts as none, its gradients are those of the whole batch, files keep it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TOWER
from forked import gradients_of_two_ranks
from rank_program import global_batch, gradient_case
from safetensors.torch import load_file

from contrastive import LitModel, load_vision_tower
from contrastive.distributed import ensure_group
from contrastive.export.export_model import MIN_COSINE, export_model
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.padding import TokenBatch
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.vision.build import build_vision_tower
from contrastive.vision.config import VisionConfig
from contrastive.vision.tower_config import TowerConfig
from data.config import DataConfig
from data.errors import UsageError

HEADS = ("linear", "mlp")
CASES = {
    f"{loss}-{stage}": {"loss": loss, "stage": stage, "chunk": 4, "head": "mlp"}
    for loss in ("sigmoid", "softmax")
    for stage in (0, 1, 2, 3)
} | {
    "bad": {"loss": "softmax", "stage": 3, "chunk": 4, "head": "mlp", "bad": True},
    "captions": {"loss": "sigmoid", "stage": 2, "chunk": 4, "head": "linear"}
    | {"positives": "caption"},
    "several": {"loss": "softmax", "stage": 1, "chunk": 4, "head": "none", "several": True},
    "several-mlp": {"loss": "sigmoid", "stage": 3, "chunk": 4, "head": "mlp", "several": True},
    "several-bad": {"loss": "softmax", "stage": 2, "chunk": 4, "head": "mlp"}
    | {"several": True, "bad": True, "positives": "caption"},
}
"""Name -> a step of 16 pairs in four micro-batches."""


def build(text: str, head: str, loss: str = "softmax", *, trained: bool = True) -> LitModel:
    """A model whose head is not at its start."""
    torch.manual_seed(0)
    tower = load_vision_tower(TINY_TOWER)
    encoder = TextEncoder(load_text_tower(TextConfig(tower=text)), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig(kind=loss)), head=head).eval()
    if trained and model.head is not None:
        torch.nn.init.normal_(model.head.out.weight, std=0.1)
    return model


def one_shot(case: dict, text: str) -> dict[str, torch.Tensor]:
    """Loss and gradients by autograd alone: all logits at once, and their definitions."""
    model = build(text, case["head"], case["loss"])
    tower = model.text.encoder.tower
    batch, features = global_batch(case.get("bad", False), tower.tokenizer, "several" in case)
    read = batch.valid.numpy()[batch.caption_slots].nonzero()[0]
    texts, scale, bias = model.text(TokenBatch.of(tower, batch.tokens.take(read)))
    logits = scale * model.embed_features(features[batch.valid]) @ texts.T
    by_caption = case.get("positives") == "caption"
    labels = batch.concepts if by_caption else torch.arange(len(batch))
    same = (labels[batch.valid, None] == labels[batch.caption_slots[read]]).float()
    if case["loss"] == "sigmoid":
        loss = -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / len(texts)
    else:
        of_images = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
        loss = (of_images + F.cross_entropy(logits.T, (same / same.sum(0)).T)) / 2
    loss.backward()
    return {"loss": loss.detach().reshape(1)} | {
        f"gradient.{n}": p.grad.reshape(-1)
        for n, p in model.trained.named_parameters()
        if p.grad is not None
    }


def assert_equal_to_one_shot(got: dict[str, torch.Tensor], case: dict, text: str) -> None:
    expected = one_shot(case, text)
    assert {name for name in got if not name.startswith("weight.")} == set(expected)
    for part in ("loss", "head.", "encoder.", "logit_"):
        names = [name for name in expected if part in name]
        if not names and part == "head." and case["head"] == "none":
            continue
        a, b = (torch.cat([of[name].double() for name in names]) for of in (got, expected))
        assert (a - b).norm() <= 1e-5 * b.norm(), part


@pytest.mark.parametrize("head", ["none", "linear"])
def test_images_are_embedded_by_one_affine_where_their_head_is_no_mlp(head, tiny_text):
    model, features = build(tiny_text, head), torch.randn(3, 32)
    model.feature_mean.normal_()
    weight, bias = model.image_affine()
    expected = torch.nn.functional.normalize(features @ weight.T + bias, dim=-1)
    torch.testing.assert_close(model.embed_features(features), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_starts_at_what_none_gives(head, tiny_text):
    images = torch.randn(2, 3, 240, 240)
    none, started = build(tiny_text, "none"), build(tiny_text, head, trained=False)
    assert torch.equal(started.encode_image(images, 48), none.encode_image(images, 48))
    moved = build(tiny_text, head).encode_image(images, 48)
    assert not torch.allclose(moved, none.encode_image(images, 48), atol=1e-3)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_a_step_are_those_of_autograd(head, loss, chunk, tiny_text):
    ensure_group()
    case = {"loss": loss, "stage": 0, "chunk": chunk, "head": head, "tower": TINY_TOWER}
    assert_equal_to_one_shot(gradient_case(case, tiny_text), case, tiny_text)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_text):
    """All cases in one launch."""
    return gradients_of_two_ranks(tmp_path_factory.mktemp("two"), tiny_text, TINY_TOWER, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_ranks_and_zero_change_no_gradient(case, two_ranks, tiny_text):
    got = load_file(two_ranks / f"{case}.safetensors")
    assert_equal_to_one_shot(got, CASES[case], tiny_text)


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_head_loads_equal_and_is_part_of_the_images_identity(head, tiny_text, tmp_path):
    model = build(tiny_text, head)
    model.save_pretrained(tmp_path)
    again = LitModel.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 240, 240)
    assert torch.equal(again.encode_image(images, 48), model.encode_image(images, 48))
    assert again.image_fingerprint == model.image_fingerprint
    assert again.text_fingerprint == model.text_fingerprint
    none = build(tiny_text, "none")
    assert none.image_fingerprint != model.image_fingerprint
    assert none.text_fingerprint == model.text_fingerprint
    said = {"linear": "locked under a linear head", "mlp": "locked under a gated MLP"}
    assert said[head] in (tmp_path / "README.md").read_text()


def test_a_run_resumes_bit_identical(tiny_text, emoji_shards, tmp_path):
    """With a head, several captions of an image, and a text tower that is held, frozen in part."""
    cfg = TrainConfig(
        name="whole",
        out=str(tmp_path),
        data=DataConfig((f"{emoji_shards}/train/*.tar",), num_workers=0, captions_per_image=3),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48,), head="mlp"),
        text=TextConfig(tiny_text, context_length=12, decay_to_start=9.0, trainable=("layer.1",)),
        loss=LossConfig(kind="softmax"),
        optim=OptimConfig(lr=1e-2, schedule="linear", cooldown_steps=1),
        zero=ZeroConfig(micro_batch_size=8),
        global_batch_size=16,
        init_samples=32,
        steps=4,
    )
    whole = LitModel.from_pretrained(train(cfg) / "model")
    part = dataclasses.replace(cfg, name="part", steps=3, checkpoint_every=2)
    (train(part) / "checkpoints/step_00000003/state.json").unlink()
    part = dataclasses.replace(part, steps=4)
    again = LitModel.from_pretrained(train(part, resume=True) / "model")
    assert whole.head.out.weight.any()
    assert again.image_fingerprint == whole.image_fingerprint
    assert again.text_fingerprint == whole.text_fingerprint
    before = load_text_tower(cfg.text).state_dict()
    after = whole.text.encoder.tower.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layer.1" in name for name in changed)


def exportable(text: str, head: str) -> LitModel:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    config = TowerConfig(
        "vit_small_patch14_dinov2", {"img_size": 56, **sizes}, image_size=56, patch_sizes=(28,)
    )
    tower = build_vision_tower(config).lock()
    encoder = TextEncoder(load_text_tower(TextConfig(text)), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig()), head=head).eval()
    model.feature_mean.normal_(std=0.3)
    torch.nn.init.normal_(model.head.out.weight, std=0.3)
    return model


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_exports_fold_a_linear_head_and_refuse_an_mlp(to, tiny_text, tmp_path):
    least = export_model(exportable(tiny_text, "linear"), to, 28, tmp_path / "linear")
    assert min(least) >= MIN_COSINE
    with pytest.raises(UsageError, match=f"{to} cannot express this model's image head"):
        export_model(exportable(tiny_text, "mlp"), to, 28, tmp_path / "mlp")
    assert not (tmp_path / "mlp").exists()


@pytest.mark.parametrize("head", HEADS)
def test_onnx_takes_any_head(head, tiny_text, tmp_path):
    assert min(export_model(exportable(tiny_text, head), "onnx", 28, tmp_path / "x")) >= MIN_COSINE
