"""Packed texts give what padded ones give: forward, gradients, and a whole training step."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TOWER
from gradients import build_model, random_pairs, relative_error, step_gradients
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from contrastive import distributed
from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig
from contrastive.text import packing
from contrastive.text.config import Pooling
from contrastive.text.encoder import TextEncoder
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.transformers import HFTextTower
from contrastive.train import step
from data.token_ids import TokenIds

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 24, "vocab_size": 90}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 90}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0}
FAMILIES = {
    "bert": (BertModel, BertConfig, BERT),
    "roberta": (RobertaModel, RobertaConfig, BERT),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, BERT),
    "camembert": (CamembertModel, CamembertConfig, BERT),
    "electra": (ElectraModel, ElectraConfig, BERT | {"embedding_size": 16}),
    "distilbert": (DistilBertModel, DistilBertConfig, DISTIL),
}


class _Tokenizer:
    """What a tower asks of one while it pads."""

    pad_token_id = 1


def make_tower(family: str, pooling: Pooling = "mean") -> HFTextTower:
    """A random network of two layers."""
    network, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return HFTextTower(network(config(**sizes, pad_token_id=1)), _Tokenizer(), pooling, 16)


def make_texts() -> TokenIds:
    """Twelve texts of 1 to 16 tokens, none of them the padding's, in the middle of more."""
    lengths = [3, 1, 16, 7, 7, 2, 5, 16, 1, 9, 4, 4]
    ids = np.random.default_rng(0).integers(5, 90, sum(lengths) + 5).astype(np.int32)
    return TokenIds(ids, 3 + np.cumsum([0, *lengths]))


def block_diagonal(query, key, value, bounds, longest, scale):
    """What the GPU's kernel computes, with a mask of n x n."""
    assert longest == int(bounds.diff().max())
    text = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    heads = [part.transpose(0, 1) for part in (query, key, value)]
    own = text[:, None] == text
    return F.scaled_dot_product_attention(*heads, attn_mask=own, scale=scale).transpose(0, 1)


def vectors_and_gradients(encoder: TextEncoder, tokens: TokenBatch | PackedTokens):
    """Embeddings, and every parameter's gradient of a sum in which each counts differently."""
    encoder.zero_grad()
    embeds = encoder(tokens)
    torch.manual_seed(1)
    (embeds * torch.randn_like(embeds)).sum().backward()
    named = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return embeds.detach(), named


@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_equal_padded_ones(family, pooling, monkeypatch):
    monkeypatch.setattr(packing, "attend_within", block_diagonal)
    tower, ids = make_tower(family, pooling), make_texts()
    assert tower.can_pack
    before = tower.config()
    encoder = TextEncoder(tower, 24).train()
    expected, slopes = vectors_and_gradients(encoder, TokenBatch.of(tower, ids))
    got, own_slopes = vectors_and_gradients(encoder, PackedTokens.of(ids))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert set(own_slopes) == set(slopes)
    for name, slope in slopes.items():
        torch.testing.assert_close(own_slopes[name], slope, rtol=1e-4, atol=1e-5, msg=name)
    again, _ = vectors_and_gradients(encoder, TokenBatch.of(tower, ids))  # padding still pads
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert tower.config() == before


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_equal_padded_ones_on_a_gpu(family, pooling):
    tower, ids = make_tower(family, pooling), make_texts()
    encoder = TextEncoder(tower, 24).cuda().train()
    with torch.autocast("cuda", torch.bfloat16):
        expected, slopes = vectors_and_gradients(encoder, TokenBatch.of(tower, ids).to("cuda"))
        got, own_slopes = vectors_and_gradients(encoder, PackedTokens.of(ids).to("cuda"))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    both = [torch.cat([s[n].flatten() for n in sorted(slopes)]) for s in (own_slopes, slopes)]
    assert (both[0] - both[1]).norm() <= 2e-2 * both[1].norm()


def test_networks_that_cannot_pack_pad():
    sizes = {k: v for k, v in BERT.items() if k != "vocab_size"}
    relative = MPNetModel(MPNetConfig(vocab_size=90, **sizes))
    assert not HFTextTower(relative, _Tokenizer(), "mean", 16).can_pack
    dropout = BertModel(BertConfig(**BERT | {"attention_probs_dropout_prob": 0.1}))
    assert not HFTextTower(dropout, _Tokenizer(), "mean", 16).can_pack
    assert not step.packs_texts(make_tower("bert"), torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(("dtype", "stage", "bound"), [("float64", 0, 1e-10), ("float32", 3, 1e-5)])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_step_with_packed_texts_has_the_gradients_of_padded_ones(
    kind, dtype, stage, bound, tiny_text, monkeypatch
):
    """Of all texts at once and of four micro-batches, one of which has no good sample."""
    monkeypatch.setattr(packing, "attend_within", block_diagonal)
    distributed.ensure_group()
    found = {}
    for packed, size in [(False, 0), (True, 0), (True, 4)]:
        monkeypatch.setattr(step, "packs_texts", lambda *_, packed=packed: packed)
        model = build_model(TINY_TOWER, tiny_text, LossConfig(kind=kind), getattr(torch, dtype))
        batch, features = random_pairs(model, 16)
        valid = batch.valid.clone()
        valid[3:] = False
        batch = dataclasses.replace(batch, valid=valid)
        zero = ZeroConfig(stage=stage, micro_batch_size=size)
        found[packed, size] = step_gradients(model, zero, batch, features)
    for case in found.values():
        assert relative_error(case, found[False, 0]) <= bound
        assert case["loss"].item() == pytest.approx(found[False, 0]["loss"].item(), rel=bound)


def test_packed_micro_batches_hold_about_as_many_tokens_each(tiny_text, monkeypatch):
    """So that the longest texts of a large batch do not stand together."""
    monkeypatch.setattr(packing, "attend_within", block_diagonal)
    monkeypatch.setattr(step, "packs_texts", lambda *_: True)
    model = build_model(TINY_TOWER, tiny_text, LossConfig(), torch.float64)
    batch, _ = random_pairs(model, 256)
    shape = step.BatchShape(256, 32, 8)
    parts = step.TrainStep(model, None, shape, 0).split_texts(batch, batch.valid)
    sizes = [len(part.tokens.ids) for part in parts]
    assert sum(sizes) == batch.tokens.lengths.sum()
    assert max(sizes) - min(sizes) <= 8
    slots = torch.cat([part.slots for part in parts])
    assert slots.sort().values.tolist() == list(range(256))
