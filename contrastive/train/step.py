"""One optimiser step: gather the images' features, read the texts in micro-batches, update.

The image tower is locked, so its features are constants of the loss: they are gathered once,
without gradient and while the first texts are read, and the loss splits exactly over micro-batches
of texts. No gradient crosses ranks but the parameters' own.

Where an image head is trained, its embeddings are gathered likewise. The gradient with respect to
them is added up over micro-batches and ranks, and in the last micro-batch each rank leads that of
its own images back through the head (GradCache, Gao et al., arXiv:2101.06983).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.model.lit import LitModel
from contrastive.model.loss import Logsumexps, Positives, logsumexps, loss_share
from contrastive.run.zero import BatchShape
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from data.batch import Batch
from data.errors import DataError
from data.token_ids import TokenIds


@dataclass(frozen=True)
class MicroBatch:
    """Texts of this rank that go through the tower together."""

    tokens: TokenBatch | PackedTokens
    slots: Int[Tensor, " m"]  # of this rank's batch
    empty: bool  # no good sample: one empty text is read and counts nothing


class GlobalBatch:
    """All ranks' image embeddings, without gradient; gathering starts when this is made.

    embeds: of this rank's slots. dtype: of the products of the loss, on a GPU.
    """

    def __init__(
        self,
        model: LitModel,
        batch: Batch,
        embeds: Float[Tensor, "b d"],
        valid: Bool[Tensor, " b"],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = embeds.device
        self._step, self._size = batch.step, len(valid)
        self._by_caption = model.text.loss.positives == "caption"
        self._valid = distributed.start_all_gather(valid.to(device))
        if device.type == "cuda" and dtype == torch.bfloat16:
            embeds = embeds.bfloat16()
        self._images = distributed.start_all_gather(embeds)
        self._concepts = distributed.start_all_gather(batch.concepts.to(device))

    @property
    def images(self) -> Float[Tensor, "b d"]:
        """Embeddings of all good images. Raises `DataError` if none is good."""
        return self._arrived[0]

    def positives(self, part: MicroBatch) -> Positives:
        """Which of all good images are positives of these texts."""
        _, labels, rows = self._arrived
        return Positives(labels, labels[rows[part.slots]])

    def rows(self, slots: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The rows among all good images of good slots of this rank."""
        return self._arrived[2][slots]

    @cached_property
    def _arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """Good images, their labels, and the row among them of each own slot."""
        valid, images, concepts = self._valid(), self._images(), self._concepts()
        if not valid.any():
            raise DataError(f"step {self._step}: not one sample of the batch could be read")
        rows = valid.long().cumsum(0) - 1
        first = distributed.rank() * self._size
        if not valid.all():
            images, concepts = images[valid], concepts[valid]
        own = rows[first : first + self._size]
        labels = concepts if self._by_caption else torch.arange(len(images), device=images.device)
        return images, labels, own


class HeadStep:
    """What an image head needs of a step; without a head it needs nothing."""

    def __init__(
        self,
        model: LitModel,
        engine: Any,
        features: Float[Tensor, "b f"],
        valid: Bool[Tensor, " b"],
    ) -> None:
        """Computes `embeds`, those of this rank's slots, without gradient."""
        whitened = model.whiten(features.to(model.device))
        self._own: Tensor | None = None  # good images, as the head reads them
        self._slopes: Tensor | None = None
        if model.head is None:
            self.embeds = torch.nn.functional.normalize(whitened, dim=-1)
            return
        with torch.no_grad():
            (self.embeds,) = engine(None, whitened)
        self._slots = valid.to(model.device).nonzero()[:, 0]
        self._own = whitened[self._slots]

    def inputs(self, last: bool) -> tuple[Float[Tensor, "m d"], ...]:
        """What the engine reads beside texts: with a head this rank's good images in the last
        micro-batch. None of them before gives the head a gradient of 0, on which ZeRO counts."""
        if self._own is None:
            return ()
        return (self._own if last else self._own[:0],)

    def slopes(self, everyone: GlobalBatch) -> Float[Tensor, "b d"] | None:
        """To which micro-batches add the loss's gradient with respect to all embeddings."""
        if self._own is not None and self._slopes is None:
            self._slopes = torch.zeros_like(everyone.images, dtype=self._own.dtype)
        return self._slopes

    def lead_back(
        self, everyone: GlobalBatch, embeds: Float[Tensor, "m d"], last: bool
    ) -> Float[Tensor, ""]:
        """Something whose gradient with respect to the head is the loss's. All ranks call it.

        embeds: what the engine made of `inputs`.
        """
        slopes = self.slopes(everyone)
        if slopes is None or not last:
            return embeds.sum()  # of none
        return (embeds * distributed.all_reduce_sum(slopes)[everyone.rows(self._slots)]).sum()


class TrainStep:
    """`step(batch, features, valid)`: forward, backward, update; gives this rank's loss share.

    dtype: of the linear layers, under DeepSpeed's autocast.
    """

    max_groups = 4  # of texts of like length, per micro-batch

    def __init__(
        self,
        model: LitModel,
        engine: Any,
        shape: BatchShape,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.engine, self.shape, self.seed = model, engine, shape, seed
        self.dtype = dtype
        self.packed = packs_texts(model.text.encoder.tower, model.device, dtype)

    def __call__(
        self, batch: Batch, features: Float[Tensor, "b d"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        head = HeadStep(self.model, self.engine, features, valid)
        everyone = GlobalBatch(self.model, batch, head.embeds, valid, self.dtype)
        parts = self.split_texts(batch, valid)
        kind = self.model.text.loss.kind
        first_pass = kind == "softmax" and len(parts) > 1
        known = self._logsumexps(batch.step, parts, everyone) if first_pass else []
        total = torch.zeros((), device=self.model.device)
        for number, part in enumerate(parts):
            self._seed_dropout(batch.step, number)
            last = number == len(parts) - 1
            text_embeds, scale, bias, *own = self.engine(part.tokens, *head.inputs(last))
            images = everyone.images
            lse = known[number] if known else None
            if kind == "softmax" and lse is None:
                own, of_texts = _own_lse(part, everyone, text_embeds, scale)
                lse = sum_over_ranks(own), of_texts
            if part.empty:  # every parameter takes part, with a gradient of 0
                share = (text_embeds.sum() + scale + (0 if bias is None else bias)) * 0.0
            else:
                positives, slopes = everyone.positives(part), head.slopes(everyone)
                share = loss_share(kind, images, text_embeds, positives, scale, bias, lse, slopes)
            total += share.detach()
            if own:
                share = share + head.lead_back(everyone, own[0], last)
            # The engine averages over micro-batches and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.micro_batches * distributed.world_size()))
            self.engine.step()
        return total

    def split_texts(self, batch: Batch, valid: Bool[Tensor, " b"]) -> list[MicroBatch]:
        """The good texts in equally many micro-batches on every rank.

        Packed ones hold about as many tokens each. Of padded ones each holds texts of like length,
        in groups of yet more like length, so padding is cheap; which samples form the global batch
        does not change.
        """
        tower, device = self.model.text.encoder.tower, self.model.device
        groups = min(self.max_groups, _num_groups(tower, device, self.shape.micro_batch_size))
        good = valid.nonzero()[:, 0].cpu().numpy()
        good = good[np.argsort(batch.tokens.lengths[good], kind="stable")]
        number = self.shape.micro_batches
        shares = [good[i::number] for i in range(number)]
        parts = []
        for rows in shares if self.packed else np.array_split(good, number):
            ids = batch.tokens.take(rows) if len(rows) else TokenIds.of(tower.tokenizer([""]))
            tokens = PackedTokens.of(ids) if self.packed else TokenBatch.of(tower, ids, groups)
            slots = torch.from_numpy(rows).to(device)
            parts.append(MicroBatch(tokens.to(device), slots, not len(rows)))
        return parts

    def _logsumexps(
        self, step: int, parts: list[MicroBatch], everyone: GlobalBatch
    ) -> list[Logsumexps]:
        """Of each micro-batch, for the softmax loss of several: a first pass over the texts,
        without gradient. (One micro-batch exchanges B numbers per rank in the middle of its loss.)
        """
        own: Tensor | None = None
        over_images = []
        with torch.no_grad():
            for number, part in enumerate(parts):
                self._seed_dropout(step, number)
                text_embeds, scale, _ = self.engine(part.tokens)
                over_texts, of_texts = _own_lse(part, everyone, text_embeds, scale)
                own = over_texts if own is None else torch.logaddexp(own, over_texts)
                over_images.append(of_texts)
        assert own is not None
        total = sum_over_ranks(own)
        return [(total, of_texts) for of_texts in over_images]

    def _seed_dropout(self, step: int, number: int) -> None:
        """Dropout is the same in both passes over a micro-batch, and after a resume."""
        mixed = np.random.SeedSequence((self.seed, step, distributed.rank(), number))
        torch.manual_seed(int(mixed.generate_state(1)[0]))


def sum_over_ranks(own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logsumexp of all ranks' partial ones: B numbers per rank cross, not B x d."""
    return distributed.all_gather(own[None]).logsumexp(0)


def packs_texts(tower: TextTower, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether texts are packed: where the kernel for it runs. The same on all ranks."""
    on_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return tower.can_pack and on_gpu and dtype == torch.bfloat16


def _num_groups(tower: TextTower, device: torch.device, num_texts: int) -> int:
    """How many groups of like length pay: fewer texts, or on a GPU tokens, in each cost more."""
    if device.type == "cpu":
        return max(1, num_texts // 128)
    return max(1, num_texts * tower.tokenizer.context_length // 2**16)


def _own_lse(
    part: MicroBatch, everyone: GlobalBatch, text_embeds: Tensor, scale: Tensor
) -> Logsumexps:
    """Of one micro-batch: -inf for each image where it is empty."""
    over_texts, over_images = logsumexps(everyone.images, text_embeds.detach(), scale.detach())
    return torch.full_like(over_texts, -torch.inf) if part.empty else over_texts, over_images
