"""One optimiser step: gather the images' features, read the texts in micro-batches, update.

The embeddings of all images are gathered once (`global_batch`), and the loss splits exactly over
micro-batches of texts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.model.lit import LitModel
from contrastive.model.loss import Logsumexps, logsumexps, loss_share
from contrastive.run.zero import BatchShape
from contrastive.text.encoder import TextVectors
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from contrastive.train.global_batch import GlobalBatch, HeadStep
from contrastive.varlen import has_kernel
from data.batch import Batch
from data.token_ids import TokenIds


@dataclass(frozen=True)
class MicroBatch:
    """Texts of this rank that go through the tower together."""

    tokens: TokenBatch | PackedTokens | TextVectors
    slots: Int[Tensor, " m"]  # of this rank's batch, each text's
    empty: bool  # no good sample: one empty text is read and counts nothing


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
            text_embeds, scale, bias, *headed = self.engine(part.tokens, *head.inputs(last))
            images = everyone.images
            lse = known[number] if known else None
            if kind == "softmax" and lse is None:
                own, of_texts = _own_lse(part, everyone, text_embeds, scale)
                lse = sum_over_ranks(own), of_texts
            if part.empty:  # every parameter takes part, with a gradient of 0
                share = (text_embeds.sum() + scale + (0 if bias is None else bias)) * 0.0
            else:
                positives, slopes = everyone.positives(part.slots), head.slopes(everyone)
                share = loss_share(kind, images, text_embeds, positives, scale, bias, lse, slopes)
            total += share.detach()
            if headed:
                share = share + head.lead_back(everyone, headed[0], last)
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
        good = np.flatnonzero(valid.cpu().numpy()[batch.caption_slots])
        good = good[np.argsort(batch.tokens.lengths[good], kind="stable")]
        number = self.shape.micro_batches
        shares = [good[i::number] for i in range(number)]
        parts = []
        for rows in shares if self.packed else np.array_split(good, number):
            tokens = self._tokens(batch, rows, groups)
            slots = distributed.send(torch.from_numpy(batch.caption_slots[rows]), device)
            parts.append(MicroBatch(tokens.to(device), slots, not len(rows)))
        return parts

    def _tokens(
        self, batch: Batch, rows: Int[np.ndarray, " m"], groups: int
    ) -> TokenBatch | PackedTokens | TextVectors:
        """These texts of the batch, or an empty one."""
        tower, vectors = self.model.text.encoder.tower, batch.text_vectors
        if vectors is not None:
            return TextVectors(vectors[rows] if len(rows) else torch.zeros_like(vectors[:1]))
        ids = batch.tokens.take(rows) if len(rows) else TokenIds.of(tower.tokenizer([""]))
        return PackedTokens.of(ids) if self.packed else TokenBatch.of(tower, ids, groups)

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
    return tower.can_pack and dtype == torch.bfloat16 and has_kernel(device)


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
