"""One optimiser step: gather the images' features, read the texts in micro-batches, update.

The image tower is locked, so its features are constants of the loss: they are gathered once,
without gradient and while the first texts are read, and the loss splits exactly over micro-batches
of texts. No gradient crosses ranks but the parameters' own.
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
from contrastive.model.loss import Reduce, loss_share, pair_targets, partial_lse
from contrastive.run.zero import BatchShape
from contrastive.text.padding import TokenBatch
from data.batch import Batch
from data.errors import DataError
from data.token_ids import TokenIds


@dataclass(frozen=True)
class MicroBatch:
    """Texts of this rank that go through the tower together."""

    tokens: TokenBatch
    slots: Int[Tensor, " m"]  # of this rank's batch
    empty: bool  # no good sample: one empty text is read and counts nothing


class GlobalBatch:
    """All ranks' image features, without gradient; gathering starts when this is made."""

    def __init__(
        self,
        model: LitModel,
        batch: Batch,
        features: Float[Tensor, "b d"],
        valid: Bool[Tensor, " b"],
    ) -> None:
        device = model.device
        self._step, self._size = batch.step, len(valid)
        self._by_caption = model.text.loss.positives == "caption"
        self._valid = distributed.start_all_gather(valid.to(device))
        self._images = distributed.start_all_gather(model.embed_features(features.to(device)))
        self._concepts = distributed.start_all_gather(batch.concepts.to(device))

    def targets(self, part: MicroBatch) -> Float[Tensor, "b m"]:
        """Which of all good images are positives of these texts. Raises `DataError` if none is
        good."""
        images, concepts, rows = self.arrived
        own = rows[part.slots] if not part.empty else rows.new_zeros(1)
        return pair_targets(len(images), own, concepts, images.dtype)

    @cached_property
    def arrived(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Good images, their concepts where those count, and the image row of each own slot."""
        valid, images, concepts = self._valid(), self._images(), self._concepts()
        if not valid.any():
            raise DataError(f"step {self._step}: not one sample of the batch could be read")
        rows = valid.long().cumsum(0) - 1
        first = distributed.rank() * self._size
        if not valid.all():
            images, concepts = images[valid], concepts[valid]
        own = rows[first : first + self._size]
        return images, concepts if self._by_caption else None, own


class TrainStep:
    """`step(batch, features, valid)`: forward, backward, update; gives this rank's loss share."""

    max_groups = 4  # of texts of like length, per micro-batch

    def __init__(self, model: LitModel, engine: Any, shape: BatchShape, seed: int) -> None:
        self.model, self.engine, self.shape, self.seed = model, engine, shape, seed

    def __call__(
        self, batch: Batch, features: Float[Tensor, "b d"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        everyone = GlobalBatch(self.model, batch, features, valid)
        parts = self._split_texts(batch, valid)
        reduce_lse = self._lse_over_texts(batch.step, parts, everyone)
        kind = self.model.text.loss.kind
        total = torch.zeros((), device=self.model.device)
        for number, part in enumerate(parts):
            self._seed_dropout(batch.step, number)
            text_embeds, scale, bias = self.engine(part.tokens)
            images, targets = everyone.arrived[0], everyone.targets(part)
            share = loss_share(kind, images, text_embeds, targets, scale, bias, reduce_lse)
            if part.empty:
                share = share * 0.0
            # The engine averages over micro-batches and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.micro_batches * distributed.world_size()))
            self.engine.step()
            total += share.detach()
        return total

    def _split_texts(self, batch: Batch, valid: Bool[Tensor, " b"]) -> list[MicroBatch]:
        """The good texts in equally many micro-batches on every rank, short ones with short ones.

        Within a micro-batch too, texts of like length are padded together, so padding is cheap;
        which samples form the global batch does not change.
        """
        tower, device = self.model.text.encoder.tower, self.model.device
        num_groups = max(
            1, min(self.max_groups, self.shape.micro_batch_size // 128)
        )  # fewer cost more
        good = valid.nonzero()[:, 0].cpu().numpy()
        good = good[np.argsort(batch.tokens.lengths[good], kind="stable")]
        parts = []
        for rows in np.array_split(good, self.shape.micro_batches):
            ids = batch.tokens.take(rows) if len(rows) else TokenIds.of(tower.tokenizer([""]))
            tokens = TokenBatch.of(tower, ids, num_groups).to(device)
            parts.append(MicroBatch(tokens, torch.from_numpy(rows).to(device), not len(rows)))
        return parts

    def _lse_over_texts(self, step: int, parts: list[MicroBatch], everyone: GlobalBatch) -> Reduce:
        """Turns a micro-batch's partial logsumexps into those over all texts.

        One micro-batch: B numbers per rank are exchanged in the middle of its loss. Several: a
        first pass over the texts, without gradient, collects them.
        """
        if len(parts) == 1 or self.model.text.loss.kind != "softmax":
            return lambda own: sum_over_ranks(_unless(parts[0].empty, own))
        partials = []
        with torch.no_grad():
            for number, part in enumerate(parts):
                self._seed_dropout(step, number)
                text_embeds, scale, _ = self.engine(part.tokens)
                own = partial_lse(everyone.arrived[0], text_embeds, scale)
                partials.append(_unless(part.empty, own))
        total = sum_over_ranks(torch.stack(partials).logsumexp(0))
        return lambda _: total

    def _seed_dropout(self, step: int, number: int) -> None:
        """Dropout is the same in both passes over a micro-batch, and after a resume."""
        mixed = np.random.SeedSequence((self.seed, step, distributed.rank(), number))
        torch.manual_seed(int(mixed.generate_state(1)[0]))


def sum_over_ranks(own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logsumexp of all ranks' partial ones: B numbers per rank cross, not B x d."""
    return distributed.all_gather(own[None]).logsumexp(0)


def _unless(empty: bool, own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.full_like(own, -torch.inf) if empty else own
