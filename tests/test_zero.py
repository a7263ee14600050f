"""Batch arithmetic, DeepSpeed's JSON and its engine."""

import json

import pytest
import torch

from contrastive.distributed import ensure_group
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.zero import (
    batch_shape,
    build_engine,
    deepspeed_config,
    enough_memory,
    largest_divisor,
    whole_parameters,
)
from contrastive.train.micro_batch import CPU_TEXTS
from data.errors import UsageError


@pytest.mark.parametrize(("ranks", "chunk"), [(1, 0), (2, 8), (4, 16), (8, 1)])
def test_ranks_chunks_and_chunk_multiply_to_the_global_batch(ranks, chunk):
    shape = batch_shape(64, chunk, ranks)
    assert ranks * shape.micro_batches * shape.micro_batch_size == 64
    config = deepspeed_config(ZeroConfig(stage=1), OptimConfig(), shape, ranks)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == (
        shape.per_rank
    )


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UsageError, match="10 cannot be shared by 4 ranks; allowed are multiples"):
        batch_shape(10, 0, 4)
    with pytest.raises(UsageError, match=r"zero\.micro_batch_size 3 does not divide"):
        batch_shape(16, 3, 2)


def test_bf16_never_casts_the_temperature():
    shape = batch_shape(8, 0, 1)
    config = deepspeed_config(ZeroConfig(precision="bfloat16"), OptimConfig(), shape, 1)
    assert "bf16" not in config
    assert config["torch_autocast"]["lower_precision_safe_modules"] == ["torch.nn.Linear"]


def test_a_user_json_is_merged_deeply(tmp_path):
    file = tmp_path / "ds.json"
    user = {
        "zero_optimization": {"overlap_comm": True},
        "train_batch_size": 8,
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(user))
    shape = batch_shape(8, 0, 1)
    config = deepspeed_config(ZeroConfig(stage=2), OptimConfig(), shape, 1, str(file))
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("user", "sentence"),
    [
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps = 3"),
        ({"optimizer": {"type": "Adam"}}, "may not say 'optimizer'"),
    ],
)
def test_a_contradicting_user_json_is_refused(user, sentence, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(user))
    with pytest.raises(UsageError, match=sentence):
        deepspeed_config(ZeroConfig(), OptimConfig(), batch_shape(8, 0, 1), 1, str(file))


@pytest.mark.parametrize(("share", "chunk"), [(100, 100), (512, 256), (1000, 250), (257, 1)])
def test_a_found_chunk_divides_a_ranks_share(share, chunk):
    assert largest_divisor(share, CPU_TEXTS) == chunk


@pytest.mark.parametrize(("micro_batch", "said"), [(15, "=6 takes less"), (1, "zero.stage")])
def test_a_gpu_out_of_memory_names_a_smaller_micro_batch(micro_batch, said):
    """6: the largest divisor of a rank's 60 pairs that is at most half of 15."""
    with (
        pytest.raises(UsageError, match=rf"out of memory with micro-batches of \d+; .*{said}"),
        enough_memory(batch_shape(120, micro_batch, 2)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_gpu_out_of_memory_is_one_sentence_whoever_says_so(said):
    shape, smaller = batch_shape(64, 16, 1), r"of 16; zero\.micro_batch_size=8 takes less"
    with pytest.raises(UsageError, match=smaller), enough_memory(shape):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="another"), enough_memory(shape):
        raise RuntimeError("another")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adamw_stays_fused_at_every_stage(stage):
    ensure_group()
    optim, shape = OptimConfig(), batch_shape(8, 0, 1)
    config = deepspeed_config(ZeroConfig(stage=stage), optim, shape, 1)
    engine = build_engine(torch.nn.Linear(4, 4), optim, config)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(inner, torch.optim.AdamW)
    assert all(group["fused"] for group in inner.param_groups)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_does_not_wait_for_the_gpu_at_every_micro_batch(stage, monkeypatch):
    """After the two steps that its clock leaves out."""
    from deepspeed.accelerator import get_accelerator

    waits: list[int] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    ensure_group()
    optim = OptimConfig()
    config = deepspeed_config(ZeroConfig(stage=stage), optim, batch_shape(8, 4, 1), 1)
    engine = build_engine(torch.nn.Linear(4, 4), optim, config)
    for micro_batch in range(8):
        if micro_batch == 4:
            waits.clear()
        engine.backward(engine(torch.randn(4, 4)).mean())
        engine.step()
    assert not waits


class Towered(torch.nn.Module):
    """A tower, and a projection after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.projection = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(self.tower(x))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_tower_decays_to_its_start_and_the_rest_to_zero(stage):
    """As written out by hand."""
    ensure_group()
    optim = OptimConfig(name="sgd", lr=0.5, weight_decay=0.0, clip_norm=0.0)
    config = deepspeed_config(ZeroConfig(stage=stage), optim, batch_shape(8, 0, 1), 1)
    module, plain, x = Towered(), Towered(), torch.randn(8, 4)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    engine = build_engine(module, optim, config, decay_to_start=0.4)
    for _ in range(3):
        engine.backward(engine(x).square().mean())
        engine.step()
        plain.zero_grad()
        plain(x).square().mean().backward()
        for name, p in plain.named_parameters():
            held = 0.2 * (start[name] - p.data) if name.startswith("tower") else 0.0
            p.data += held - 0.5 * p.grad
    with whole_parameters(module):
        for name, p in module.named_parameters():
            expected = dict(plain.named_parameters())[name]
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(p, start[name])
