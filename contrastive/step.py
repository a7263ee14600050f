"""One optimiser step: gather the images' features, read the texts in chunks, step.

The image tower is locked, so its features are constants of the loss: they are gathered once,
without gradient, and the loss splits exactly over chunks of texts. No gradient crosses ranks but
the parameters' own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.lit import LitModel
from contrastive.loss import Reduce, pair_targets
from contrastive.text import TokenGroups
from contrastive.zero import BatchShape
from data.batch import Batch
from data.errors import DataError


@dataclass(frozen=True)
class Chunk:
    """Some of this rank's texts, and at which row of the global batch their images stand."""

    tokens: TokenGroups
    rows: Int[Tensor, " m"]
    empty: bool  # no good sample: the chunk reads one empty text and counts nothing


class TrainStep:
    """`step(batch, features, valid)`: forward, backward, update; gives this rank's loss share."""

    def __init__(self, model: LitModel, engine: Any, shape: BatchShape, seed: int) -> None:
        self.model, self.engine, self.shape, self.seed = model, engine, shape, seed

    def __call__(
        self, batch: Batch, features: Float[Tensor, "b d"], valid: Bool[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        images, own_rows, concepts = self._gather_images(batch, features, valid)
        if self.model.text.loss.positives == "pair":
            concepts = None
        chunks = self._split_texts(batch, valid, own_rows)
        reduce_lse = self._lse_over_texts(batch.step, chunks, images)
        total = torch.zeros((), device=images.device)
        for number, chunk in enumerate(chunks):
            targets = pair_targets(len(images), chunk.rows, concepts, images.dtype)
            self._seed_dropout(batch.step, number)
            share = self.engine(chunk.tokens, images, targets, reduce_lse)
            if chunk.empty:
                share = share * 0.0
            # The engine averages over chunks and ranks; shares are to be summed.
            self.engine.backward(share * (self.shape.chunks * distributed.world_size()))
            self.engine.step()
            total += share.detach()
        return total

    def _gather_images(
        self, batch: Batch, features: Float[Tensor, "b d"], valid: Bool[Tensor, " b"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, " b"], Int[Tensor, " n"] | None]:
        """All ranks' good images, which of their rows each local sample is, and their concepts."""
        device = self.model.device
        everywhere = distributed.all_gather(valid.to(device))
        if not everywhere.any():
            raise DataError(f"step {batch.step}: not one sample of the batch could be read")
        images = distributed.all_gather(self.model.embed_features(features.to(device)))
        concepts = distributed.all_gather(batch.concepts.to(device))
        rows = everywhere.long().cumsum(0) - 1
        first = distributed.rank() * len(valid)
        return images[everywhere], rows[first : first + len(valid)], concepts[everywhere]

    def _split_texts(
        self, batch: Batch, valid: Bool[Tensor, " b"], own_rows: Int[Tensor, " b"]
    ) -> list[Chunk]:
        """The good texts in equally many chunks on every rank, short texts with short ones.

        Within a chunk too, texts of like length go together through the tower, so padding is
        cheap; which samples form the global batch does not change.
        """
        num_groups = max(1, min(4, self.shape.chunk // 32))
        good = sorted(valid.nonzero()[:, 0].tolist(), key=lambda i: len(batch.captions[i]))
        chunks = []
        for part in np.array_split(np.asarray(good, dtype=np.int64), self.shape.chunks):
            texts = [batch.captions[i] for i in part] or [""]
            tokens = TokenGroups.of(self.model.text.encoder.tower, texts, num_groups)
            rows = own_rows[torch.from_numpy(part).to(own_rows.device)]
            chunks.append(
                Chunk(
                    tokens.to(self.model.device),
                    rows if len(part) else rows.new_zeros(1),
                    not len(part),
                )
            )
        return chunks

    def _lse_over_texts(
        self, step: int, chunks: list[Chunk], images: Float[Tensor, "n d"]
    ) -> Reduce:
        """What turns a chunk's partial logsumexps into those over all texts.

        One chunk: B numbers per rank are exchanged in the middle of its only forward. Several: a
        first pass over the texts, without gradient, collects them.
        """
        if len(chunks) == 1 or self.model.text.loss.kind != "softmax":
            return lambda partial: sum_over_ranks(_unless(chunks[0].empty, partial))
        partials = []
        with torch.no_grad():
            for number, chunk in enumerate(chunks):
                self._seed_dropout(step, number)
                partials.append(_unless(chunk.empty, self.engine(chunk.tokens, images)))
        total = sum_over_ranks(torch.stack(partials).logsumexp(0))
        return lambda _: total

    def _seed_dropout(self, step: int, chunk: int) -> None:
        """Dropout is the same in both passes over a chunk, and after a resume."""
        mixed = np.random.SeedSequence((self.seed, step, distributed.rank(), chunk))
        torch.manual_seed(int(mixed.generate_state(1)[0]))


def sum_over_ranks(partial: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logsumexp of all ranks' partial ones: B numbers per rank cross, not B x d."""
    return distributed.all_gather(partial[None]).logsumexp(0)


def _unless(empty: bool, partial: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.full_like(partial, -torch.inf) if empty else partial
