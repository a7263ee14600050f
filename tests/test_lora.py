"""A text tower trained by LoRA: it starts as it is, keeps its weights, and is saved as any."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_TOWER
from forked import gradients_of_two_ranks, ranks
from gradients import add_spread_lora
from launcher import ROOT
from rank_program import gradient_case
from safetensors.torch import load_file
from test_packing import block_diagonal, make_texts, make_tower, vectors_and_gradients
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from contrastive import LitModel
from contrastive.distributed import ensure_group
from contrastive.export.export_model import MIN_COSINE, export_model
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.optim import build_optimizer
from contrastive.text import lora, packing
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.lora import add_lora, merged
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.transformers import HFTextTower
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.train.step import TrainStep
from contrastive.vision.config import VisionConfig
from data.config import DataConfig
from data.errors import UsageError

TEXTS = ["a red bicycle", "two dogs", "a happy cat"]
RANK = 4
CASES = {
    f"{loss}-{stage}": {"loss": loss, "stage": stage, "chunk": 4, "lora": RANK}
    for loss in ("sigmoid", "softmax")
    for stage in (0, 1, 2, 3)
}
"""Name -> a step of 16 pairs in four micro-batches."""
NEEDS_NO_PEFT = """
import sys
sys.modules["peft"] = None  # an import of it fails, as where it is not installed
from contrastive import LitModel
model = LitModel.from_pretrained(sys.argv[1])
assert not any(".lora_" in name for name in model.state_dict())
print(model.text_fingerprint)
"""


def config(out: Path, text: str, shards: Path, name: str = "whole", **changes) -> TrainConfig:
    cfg = TrainConfig(
        name=name,
        out=str(out),
        data=DataConfig((f"{shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48,), head="mlp"),
        text=TextConfig(text, context_length=12, lora=RANK, head="mlp"),
        loss=LossConfig(kind="softmax"),
        optim=OptimConfig(lr=1e-2, schedule="linear", cooldown_steps=1),
        zero=ZeroConfig(micro_batch_size=8),
        global_batch_size=16,
        init_samples=32,
        steps=4,
    )
    return dataclasses.replace(cfg, **changes)


def without_lora(cfg: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, lora=0), **changes)


def text_weights(run: Path) -> dict[str, torch.Tensor]:
    weights = load_file(run / "model/model.safetensors")
    return {name: w for name, w in weights.items() if name.startswith(("text.", "head."))}


def named_as_loaded(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tower's own weights."""
    return {n.replace(".base_layer", ""): w for n, w in tower.state_dict().items()}


def test_only_narrow_matrices_train_beside_every_linear_layer(tiny_text):
    tower = load_text_tower(TextConfig(tiny_text))
    before = {name: w.clone() for name, w in tower.state_dict().items()}
    add_lora(tower, RANK)
    trained = {name: p for name, p in tower.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    # rank * (in + out): query, key, value and output of width 32, two layers between it and 64
    assert sum(p.numel() for p in trained.values()) == 2 * RANK * (4 * (32 + 32) + 2 * (32 + 64))
    own = named_as_loaded(tower)
    assert all(torch.equal(own[name], weight) for name, weight in before.items())
    optimizer = build_optimizer(OptimConfig(), TextSide(TextEncoder(tower, 32), LossConfig()))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trained.values()} < held
    assert len(held) == len(trained) + 3  # projection, scale and bias


def test_a_run_starts_as_one_without(tiny_text, emoji_shards, tmp_path, monkeypatch):
    """To the last bit: what is drawn for heads and projection, what is solved, and the loss."""
    seen = []
    call = TrainStep.__call__

    def noted(self, batch, features, valid):
        seen.append(call(self, batch, features, valid))
        return seen[-1]

    monkeypatch.setattr(TrainStep, "__call__", noted)
    cfg = config(tmp_path, tiny_text, emoji_shards, steps=1)
    train(cfg)
    train(without_lora(cfg, name="none"))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_merged_it_is_the_ordinary_tower_of_the_same_function(family):
    """And after it, what trained is there again: the same parameters, untouched."""
    tower, ids = make_tower(family), make_texts()
    names, facts = list(tower.state_dict()), tower.config()
    texts = TokenBatch.of(tower, ids).groups
    with torch.no_grad():
        plain = tower(texts)
        add_spread_lora(tower, RANK)
        held = {name: (p, p.detach().clone()) for name, p in tower.named_parameters()}
        expected = tower(texts)
        with merged(tower):
            assert list(tower.state_dict()) == names
            assert tower.config() == facts
            found = tower(texts)
        assert torch.equal(tower(texts), expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
    now = dict(tower.named_parameters())
    assert now.keys() == held.keys()
    assert all(now[name] is p and torch.equal(p, was) for name, (p, was) in held.items())


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_texts_equal_padded_ones(family, monkeypatch):
    monkeypatch.setattr(packing, "attend_within", block_diagonal)
    tower, ids = make_tower(family), make_texts()
    add_spread_lora(tower, RANK)
    encoder = TextEncoder(tower, 24).train()
    expected, slopes = vectors_and_gradients(encoder, TokenBatch.of(tower, ids))
    got, own_slopes = vectors_and_gradients(encoder, PackedTokens.of(ids))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert set(own_slopes) == set(slopes) == trained
    for name, slope in slopes.items():
        torch.testing.assert_close(own_slopes[name], slope, rtol=1e-4, atol=1e-4, msg=name)


def test_a_run_resumes_bit_identical_and_saves_an_ordinary_model(tiny_text, emoji_shards, tmp_path):
    """Saving twice in the middle changes nothing either."""
    cfg = config(tmp_path, tiny_text, emoji_shards)
    whole = text_weights(train(cfg))
    part = dataclasses.replace(cfg, name="part", steps=3, checkpoint_every=1)
    (train(part) / "checkpoints/step_00000003/state.json").unlink()
    again = train(dataclasses.replace(part, steps=4, checkpoint_every=0), resume=True)
    found = text_weights(again)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], w) for name, w in whole.items())
    before = load_text_tower(cfg.text).state_dict()
    prefix = "text.encoder.tower."
    tower = {n.removeprefix(prefix): w for n, w in whole.items() if n.startswith(prefix)}
    assert tower.keys() == before.keys()
    changed = {name for name in before if not torch.equal(tower[name], before[name])}
    wide = {n for n, w in before.items() if w.ndim == 2 and "embeddings" not in n}
    assert changed == wide
    for name in changed:
        singular = torch.linalg.svdvals((tower[name] - before[name]).double())
        assert singular[RANK] < 1e-4 * singular[0]
    command = [sys.executable, "-c", NEEDS_NO_PEFT, str(again / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == LitModel.from_pretrained(again / "model").text_fingerprint, done


def test_a_saved_model_is_exported_like_any(tiny_text, emoji_shards, tmp_path):
    """To ONNX, whose texts are read by onnxruntime."""
    cfg = config(tmp_path, tiny_text, emoji_shards, steps=1)
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, head="none"))
    model = LitModel.from_pretrained(train(cfg) / "model")
    assert min(export_model(model, "onnx", 48, tmp_path / "onnx")) >= MIN_COSINE


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
    """Where G is the gradient of W + B A: B^T G that of A, G A^T that of B."""
    tower, ids = make_tower("bert"), make_texts()
    add_spread_lora(tower, RANK)
    encoder, texts = TextEncoder(tower, 24), TokenBatch.of(tower, ids)
    _, slopes = vectors_and_gradients(encoder, texts)
    with merged(tower):
        _, wide = vectors_and_gradients(encoder, texts)
    weights = dict(encoder.named_parameters())
    layers = [name.split(".lora_A")[0] for name in slopes if ".lora_A" in name]
    assert len(layers) == 12
    for layer in layers:
        g = wide[f"{layer}.weight"]
        a, b = (f"{layer}.lora_{which}.default.weight" for which in "AB")
        torch.testing.assert_close(slopes[a], weights[b].T @ g, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(slopes[b], g @ weights[a].T, rtol=1e-3, atol=1e-4)


# ---- micro-batches, ranks, ZeRO ----------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tiny_text):
    """The gradients of one process, all texts at once."""
    ensure_group()
    whole = {"stage": 0, "chunk": 0, "tower": TINY_TOWER}
    return {
        loss: gradient_case(CASES[f"{loss}-0"] | whole, tiny_text)
        for loss in ("sigmoid", "softmax")
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_text, emoji_shards):
    """Two ranks: all gradients, and runs at ZeRO 2 and 3; beside one rank's at ZeRO 2."""
    folder = tmp_path_factory.mktemp("two")
    begun = config(folder, tiny_text, emoji_shards, "zero2", zero=ZeroConfig(2, micro_batch_size=4))
    begun = dataclasses.replace(begun, checkpoint_every=2)
    train(begun)
    trainings = [
        {"config": dataclasses.asdict(dataclasses.replace(begun, name=name, zero=zero))}
        | {"seen": str(folder / f"{name}.seen"), "resume": False}
        for name, zero in {
            "two2": begun.zero,
            "two3": dataclasses.replace(begun.zero, stage=3),
        }.items()
    ]
    return gradients_of_two_ranks(folder, tiny_text, TINY_TOWER, CASES, trainings)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_ranks_and_zero_change_no_gradient(case, one, two):
    got, expected = load_file(two / f"{case}.safetensors"), one[CASES[case]["loss"]]
    assert got.keys() == expected.keys()
    tower = {n for n in got if n.startswith("gradient.") and ".tower." in n}
    assert tower
    assert all(".lora_" in name for name in tower)
    for part in ("loss", "gradient.", "weight."):
        a, b = (
            torch.cat([of[n].double() for n in got if n.startswith(part)]) for of in (got, expected)
        )
        assert (a - b).norm() <= 1e-5 * b.norm(), part


@pytest.mark.slow
@pytest.mark.parametrize("run", ["two2", "two3"])
def test_two_ranks_save_the_model_of_one(run, two):
    """Adam's first steps divide by gradients near 0, so not to the last bits."""
    expected, got = text_weights(two / "zero2"), text_weights(two / run)
    assert got.keys() == expected.keys()
    for name, w in expected.items():
        assert (got[name] - w).norm() <= 1e-3 * w.norm(), name


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_where_deepspeed_cannot_share(
    two, tiny_text, emoji_shards
):
    """The logit scale alone has no weight decay, and two ranks have one number to share."""
    cfg = config(two, tiny_text, emoji_shards, "zero2", zero=ZeroConfig(2, micro_batch_size=4))
    case = {"config": dataclasses.asdict(dataclasses.replace(cfg, steps=5, checkpoint_every=2))}
    case |= {"seen": str(two / "again.seen"), "resume": True}
    (two / "again.json").write_text(json.dumps({"gradients": {}, "trainings": [case]}))
    done = ranks(2, ROOT / "tests/rank_program.py", str(two / "again.json"))
    assert done.returncode
    assert "among 2 ranks: resume it with 1" in done.stderr


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora": -1}, r"text\.lora -1: a rank, at least 0"),
        ({"lora": 8, "frozen": True}, r"text\.lora keeps the tower's own weights"),
        ({"lora": 8, "trainable": ("layer",)}, r"leave out text\.frozen, text\.trainable and"),
        ({"lora": 8, "decay_to_start": 0.3}, r"text\.decay_to_start"),
    ],
)
def test_flags_that_contradict_it_are_refused(fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        TextConfig(**fields)


def test_without_peft_the_extra_is_named(tiny_text, emoji_shards, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "peft" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(lora.importlib.util, "find_spec", missing)
    cfg = config(tmp_path, tiny_text, emoji_shards)
    with pytest.raises(UsageError, match=r"pip install 'flexilit\[lora\]'"):
        train(cfg)
    assert not cfg.folder.exists()


def test_towers_that_it_cannot_train_are_refused(tiny_text):
    """open_clip's own attention, and a GPT-2, whose layers are no linear ones of torch."""
    clip = load_text_tower(TextConfig("open_clip:ViT-B-32", context_length=8))
    with pytest.raises(UsageError, match="allowed: a tower of transformers"):
        add_lora(clip, RANK)
    small = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=90, n_positions=16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:"))
    tower = HFTextTower(GPT2Model(small), tokenizer, "eos", 16)
    with pytest.raises(UsageError, match="finds no linear layer in GPT2Model"):
        add_lora(tower, RANK)
