"""Gradients of a training step: in micro-batches on any number of ranks, or open_clip's in one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from contrastive import LitModel, distributed, load_vision_tower
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.zero import batch_shape, build_engine, deepspeed_config
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.lora import add_lora
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from contrastive.train.step import TrainStep
from contrastive.vision.config import Head
from data.batch import Batch
from data.token_ids import TokenIds

Gradients = dict[str, Tensor]
"""`loss`, and `gradient.NAME` of each parameter, flat."""

WORDS = ["a", "red", "bicycle", "happy", "cat", "two", "dogs", "emoji", "of", "the", "sun", "smile"]


class GradientProbe:
    """An engine that keeps the full float32 gradient just before the optimiser."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.gradients: Gradients = {}

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self.engine.is_gradient_accumulation_boundary():
            for name, parameter in self.engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                if gradient is not None:
                    self.gradients[name] = gradient.float().cpu().clone().reshape(-1)
        self.engine.step()


class PlainEngine:
    """DeepSpeed cannot reduce float64 gradients, so this replaces its engine.

    It averages over micro-batches and ranks as DeepSpeed does, and has no optimiser.
    """

    def __init__(self, module: torch.nn.Module, num_micro_batches: int) -> None:
        self.module, self.num_micro_batches = module, num_micro_batches
        self.gradients: Gradients = {}
        self._done = 0

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self.num_micro_batches).backward()

    def step(self) -> None:
        self._done += 1
        if self._done % self.num_micro_batches == 0:
            for name, parameter in self.module.named_parameters():
                assert parameter.grad is not None
                total = distributed.all_reduce_sum(parameter.grad)
                self.gradients[name] = (total / distributed.world_size()).reshape(-1)


def build_model(
    tower: str, text: str, loss: LossConfig, dtype: torch.dtype, head: Head = "none"
) -> LitModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    vision = load_vision_tower(tower)
    torch.manual_seed(0)
    encoder = TextEncoder(load_text_tower(TextConfig(tower=text)), vision.embed_dim)
    return LitModel(vision, TextSide(encoder, loss), head=head).to(dtype)


def add_spread_lora(tower: TextTower, rank: int) -> None:
    """LoRA whose matrices are not at their start, the same ones in every process."""
    add_lora(tower, rank)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tower.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def random_pairs(model: LitModel, pairs: int) -> tuple[Batch, Float[Tensor, "b d"]]:
    """The same captions of one to eight words, and image features, in every process."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (pairs,), generator=generator).tolist()
    drawn = [torch.randint(len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    captions = [" ".join(WORDS[i] for i in words) for words in drawn]
    tokens = TokenIds.of(model.text.encoder.tower.tokenizer(captions))
    valid, zeros = torch.ones(pairs, dtype=torch.bool), torch.zeros(pairs, dtype=torch.int64)
    concepts = torch.arange(pairs)
    batch = Batch(0, captions, None, captions, tokens, concepts, valid, zeros, zeros, zeros)
    return batch, torch.randn(pairs, model.embed_dim, generator=generator)


def share_of_rank(batch: Batch) -> tuple[Batch, slice]:
    """This rank's part of a global batch without pixels, and which part that is."""
    size = len(batch) // distributed.world_size()
    mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    names = ("keys", "concepts", "valid", "shards", "indices", "views")
    own: dict[str, Any] = {name: getattr(batch, name)[mine] for name in names}
    slots = batch.caption_slots
    low, high = np.searchsorted(slots, (mine.start, mine.stop)).tolist()
    own |= {name: getattr(batch, name)[low:high] for name in ("captions", "tokens")}
    own["slots"] = None if batch.slots is None else slots[low:high] - mine.start
    return replace(batch, **own), mine


def step_gradients(
    model: LitModel, zero: ZeroConfig, batch: Batch, features: Float[Tensor, "b d"]
) -> Gradients:
    """Loss and gradients of a training step over all ranks, then one SGD step (not in float64)."""
    optim = OptimConfig(name="sgd", lr=0.1, clip_norm=0.0)
    world_size = distributed.world_size()
    shape = batch_shape(len(batch), zero.micro_batch_size, world_size)
    engine: GradientProbe | PlainEngine
    if model.feature_mean.dtype == torch.float64:
        engine = PlainEngine(model.trained, shape.micro_batches)
    else:
        config = deepspeed_config(zero, optim, shape, world_size)
        engine = GradientProbe(build_engine(model.trained, optim, config))
    part, mine = share_of_rank(batch)
    step = TrainStep(model, engine, shape, 0, distributed.resolve_dtype(zero.precision))
    share = step(part, features[mine], part.valid)
    gradients = {f"gradient.{name}": g for name, g in engine.gradients.items()}
    return {"loss": distributed.all_reduce_sum(share).reshape(1), **gradients}


def one_shot_gradients(model: LitModel, batch: Batch, features: Float[Tensor, "b d"]) -> Gradients:
    """The same by open_clip's loss: all texts in one forward, padded to the longest."""
    side = model.text
    texts = side.encoder(TokenBatch.of(side.encoder.tower, batch.tokens))
    images = model.embed_features(features)
    if side.loss.kind == "sigmoid":
        loss = SigLipLoss()(images, texts, side.scale(), side.logit_bias)
    else:
        loss = ClipLoss()(images, texts, side.scale())
    loss.backward()
    named = {n: p.grad.reshape(-1) for n, p in side.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().reshape(1), **{f"gradient.{n}": g for n, g in named.items()}}


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the gradients' difference over that of the expected ones: of the encoder, or of the
    temperature and bias, whichever is larger."""
    assert set(got) == set(expected)
    names = [name for name in sorted(expected) if name.startswith("gradient.")]
    scalars = [name for name in names if "logit_" in name]
    errors = []
    for group in (scalars, sorted(set(names) - set(scalars))):
        a, b = (torch.cat([values[n].double() for n in group]) for values in (got, expected))
        errors.append(float((a - b).norm() / b.norm()))
    return max(errors)
