"""Packed texts that torch.compile reads: as plain ones, by kernels that a resumed run has again."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_training
import torch
import torch.nn.functional as F
from conftest import TINY_TOWER
from gradients import build_model, random_pairs
from test_packing import BERT, vectors_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from contrastive import LitModel, distributed
from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig
from contrastive.text import packing
from contrastive.text.packing import PackedTokens
from contrastive.train import loop, micro_batch, step
from contrastive.varlen import has_kernel
from data.token_ids import TokenIds


def attend_within(query, key, value, bounds, longest, scale):
    """What the GPU's kernel computes, without a look at values, which would end a graph."""
    text = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff(), output_size=len(query))
    heads = [part.transpose(0, 1) for part in (query, key, value)]
    own = text[:, None] == text
    return F.scaled_dot_product_attention(*heads, attn_mask=own, scale=scale).transpose(0, 1)


@pytest.fixture(autouse=True)
def without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sees no checks of shapes around what it compiles, as outside of tests."""
    for name in ("_attention", "attend_within"):
        monkeypatch.setattr(packing, name, inspect.unwrap(getattr(packing, name)))


@pytest.fixture
def packing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs texts on this CPU."""
    monkeypatch.setattr(packing, "attend_within", attend_within)
    monkeypatch.setattr(micro_batch, "packs_texts", lambda *_: True)


def make_model(tiny_text: str) -> tuple[LitModel, TokenIds]:
    """In train mode, and 24 texts of one to eight words."""
    distributed.ensure_group()
    torch.compiler.reset()
    model = build_model(TINY_TOWER, tiny_text, LossConfig(kind="softmax"), torch.float32)
    for module in model.text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.to(distributed.device()).text.train()
    return model, random_pairs(model, 24)[0].tokens


def pack(texts: TokenIds) -> PackedTokens:
    """As a training step does."""
    return PackedTokens.of(texts).to(distributed.device())


def read(model: LitModel, texts: TokenIds, dtype: torch.dtype = torch.float32) -> Any:
    """Embeddings and gradients."""
    with micro_batch.autocast(dtype):
        return vectors_and_gradients(model.text.encoder, pack(texts))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_they_are_read_as_plain_ones_and_compiled_once(tiny_text, packing_here):
    """Whatever number of texts and tokens a micro-batch has, with and without gradients."""
    model, texts = make_model(tiny_text)
    batches = [texts, texts[:5], texts[3:10], texts[2:4]]
    plain = [read(model, part) for part in batches]
    assert micro_batch.compile_texts(model, 40, torch.float32)
    with torch.compiler.set_stance("fail_on_recompile"):
        for part, (expected, slopes) in zip(batches, plain, strict=True):
            got, own_slopes = read(model, part)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert set(own_slopes) == set(slopes)
            for name, slope in slopes.items():
                torch.testing.assert_close(own_slopes[name], slope, rtol=1e-4, atol=1e-5, msg=name)
            with torch.no_grad():
                again = model.text.encoder(pack(part))
            torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_run_trains_what_it_does_without(
    tiny_text, emoji_shards, tmp_path, packing_here, monkeypatch
):
    """At ZeRO 1, which lays parameters side by side in memory; of micro-batches none compiles."""
    monkeypatch.setattr(step, "packs_texts", lambda *_: True)

    def compiled(*args: Any) -> bool:
        torch.compiler.reset()
        assert micro_batch.compile_texts(*args)
        torch.compiler.set_stance("fail_on_recompile")
        return True

    found = {}
    for name, compile_texts in (("plain", lambda *_: False), ("compiled", compiled)):
        monkeypatch.setattr(loop, "compile_texts", compile_texts)
        cfg = test_training.config(tmp_path, name, tiny_text, emoji_shards, 1, steps=4)
        zero = ZeroConfig(stage=1, micro_batch_size=8)
        loss = LossConfig(kind="softmax")
        cfg = replace(cfg, zero=zero, loss=loss, checkpoint_every=0, log_every=1)
        try:
            found[name] = test_training.weights(loop.train(cfg))
        finally:
            torch.compiler.set_stance("default")
        lines = map(json.loads, (cfg.folder / "metrics.jsonl").read_text().splitlines())
        assert {line["texts_compiled"] for line in lines} == {int(name == "compiled")}
    a, b = (test_training.flat(weights, "text.") for weights in found.values())
    assert test_training.relative(b, a) <= 1e-5


def test_with_the_kernel_of_a_gpu_they_are_one_graph(monkeypatch):
    """For every number of texts and tokens; on tensors of a GPU that have no values."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append([node.name for node in graph.graph.nodes if "varlen" in node.name])
        return graph.forward

    packing.register()
    sizes = BertConfig(**BERT | {"num_hidden_layers": 2})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        assert has_kernel(torch.device("cuda"))
        net = BertModel(sizes, add_pooling_layer=False)
        net.set_attn_implementation(packing.ATTENTION)
        blocks = torch.compile(net.encoder, dynamic=True, backend=keep)
        for tokens, texts in ((40, 4), (60, 9)):
            hidden = torch.zeros(1, tokens, 32)
            bounds = torch.zeros(texts + 1, dtype=torch.int32)
            out = blocks(hidden, cu_seq_lens_q=bounds, max_length_q=texts)
            found = out.last_hidden_state[0]
            assert (found.shape, found.device.type) == ((tokens, 32), "cuda")
    assert [len(kernels) for kernels in graphs] == [2]  # of two layers


@pytest.mark.gpu
def test_they_give_the_same_bits_whatever_batch_came_first(tiny_text):
    """A resumed run compiles anew, and its first batch is another."""
    found = []
    for first in (True, False):
        model, texts = make_model(tiny_text)
        assert micro_batch.compile_texts(model, 40, torch.bfloat16)
        if first:
            read(model, texts[2:4], torch.bfloat16)
        found.append(read(model, texts, torch.bfloat16))
    (embeds, slopes), (others, other_slopes) = found
    assert embeds.equal(others)
    for name, slope in slopes.items():
        assert slope.equal(other_slopes[name]), name


@pytest.mark.gpu
def test_they_are_read_as_plain_ones_on_a_gpu(tiny_text):
    model, texts = make_model(tiny_text)
    expected, slopes = read(model, texts, torch.bfloat16)
    assert micro_batch.compile_texts(model, 40, torch.bfloat16)
    with torch.compiler.set_stance("fail_on_recompile"):
        got, own_slopes = read(model, texts, torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    both = [torch.cat([s[n].flatten() for n in sorted(slopes)]) for s in (own_slopes, slopes)]
    assert (both[0] - both[1]).norm() <= 2e-2 * both[1].norm()


def test_where_compiling_fails_they_are_read_plainly(tiny_text, packing_here, monkeypatch, capfd):
    model, texts = make_model(tiny_text)
    expected, _ = read(model, texts)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(packing, "compiled_blocks", lambda _: fail)
    assert not micro_batch.compile_texts(model, 40, torch.float32)
    assert "without torch.compile, more slowly: RuntimeError: Failed" in capfd.readouterr().err
    assert read(model, texts)[0].equal(expected)
