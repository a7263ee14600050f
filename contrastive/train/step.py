"""One optimiser step: gather the images' features, read the texts in chunks, step.

The image tower is locked, so its features are constants of the loss: they are gathered once,
without gradient and while the first texts are read, and the loss splits exactly over chunks of
texts. No gradient crosses ranks but the parameters' own.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.model.lit import LitModel
from contrastive.model.loss import Reduce, pair_targets
from contrastive.run.zero import BatchShape
from contrastive.text.padding import TokenBatch
from data.batch import Batch
from data.errors import DataError


@dataclass(frozen=True)
class Chunk:
    """Some of this rank's texts."""

    tokens: TokenBatch
    slots: Int[Tensor, " m"]  # of this rank's batch
    empty: bool  # no good sample: the chunk reads one empty text and counts nothing


class GlobalBatch:
    """All ranks' images, on their way from the moment this is made; they carry no gradient."""

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

    def pairs(self, chunk: Chunk) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b m"]]:
        """All good images, and the targets of a chunk's texts. Raises `DataError` if none is."""
        images, concepts, rows = self.arrived
        own = rows[chunk.slots] if not chunk.empty else rows.new_zeros(1)
        return images, pair_targets(len(images), own, concepts, images.dtype)

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

    max_groups = 4  # of texts of like length, per chunk

    def __init__(self, model: LitModel, engine: Any, shape: BatchShape, seed: int) -> None:
        self.model, self.engine, self.shape, self.seed = model, engine, shape, seed

    def __call__(
        self, batch: Batch, features: Float[Tensor, "b d"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        everyone = GlobalBatch(self.model, batch, features, valid)
        chunks = self._split_texts(batch, valid)
        reduce_lse = self._lse_over_texts(batch.step, chunks, everyone)
        total = torch.zeros((), device=self.model.device)
        for number, chunk in enumerate(chunks):
            self._seed_dropout(batch.step, number)
            share = self.engine(chunk.tokens, partial(everyone.pairs, chunk), reduce_lse)
            if chunk.empty:
                share = share * 0.0
            # The engine averages over chunks and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.micro_batches * distributed.world_size()))
            self.engine.step()
            total += share.detach()
        return total

    def _split_texts(self, batch: Batch, valid: Bool[Tensor, " b"]) -> list[Chunk]:
        """The good texts in equally many chunks on every rank, short texts with short ones.

        Within a chunk too, texts of like length go together through the tower, so padding is
        cheap; which samples form the global batch does not change.
        """
        tower, device = self.model.text.encoder.tower, self.model.device
        num_groups = max(
            1, min(self.max_groups, self.shape.micro_batch_size // 128)
        )  # fewer cost more
        good = sorted(valid.nonzero()[:, 0].tolist(), key=lambda i: len(batch.tokens[i]))
        chunks = []
        for part in np.array_split(np.asarray(good, dtype=np.int64), self.shape.micro_batches):
            ids = [batch.tokens[i] for i in part] or tower.tokenizer([""])
            tokens = TokenBatch.of(tower, ids, num_groups).to(device)
            chunks.append(Chunk(tokens, torch.from_numpy(part).to(device), not len(part)))
        return chunks

    def _lse_over_texts(self, step: int, chunks: list[Chunk], everyone: GlobalBatch) -> Reduce:
        """What turns a chunk's partial logsumexps into those over all texts.

        One chunk: B numbers per rank are exchanged in the middle of its only forward. Several: a
        first pass over the texts, without gradient, collects them.
        """
        if len(chunks) == 1 or self.model.text.loss.kind != "softmax":
            return lambda own: sum_over_ranks(_unless(chunks[0].empty, own))
        partials = []
        with torch.no_grad():
            for number, chunk in enumerate(chunks):
                self._seed_dropout(step, number)
                own = self.engine(chunk.tokens, lambda: (everyone.arrived[0], None))
                partials.append(_unless(chunk.empty, own))
        total = sum_over_ranks(torch.stack(partials).logsumexp(0))
        return lambda _: total

    def _seed_dropout(self, step: int, chunk: int) -> None:
        """Dropout is the same in both passes over a chunk, and after a resume."""
        mixed = np.random.SeedSequence((self.seed, step, distributed.rank(), chunk))
        torch.manual_seed(int(mixed.generate_state(1)[0]))


def sum_over_ranks(own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logsumexp of all ranks' partial ones: B numbers per rank cross, not B x d."""
    return distributed.all_gather(own[None]).logsumexp(0)


def _unless(empty: bool, own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.full_like(own, -torch.inf) if empty else own
