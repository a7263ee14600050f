"""What a micro-batch of texts needs of all ranks' images: embeddings, and which are positives.

The image tower is locked, so its features are constants of the loss: they are gathered once,
without gradient and while the first texts are read. No gradient crosses ranks but the parameters'
own.

Where an image head is trained, its embeddings are gathered likewise. The gradient with respect to
them is added up over micro-batches and ranks, and in the last micro-batch each rank leads that of
its own images back through the head (GradCache, Gao et al., arXiv:2101.06983).
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive import distributed
from contrastive.model.lit import LitModel
from contrastive.model.loss import Positives
from data.batch import Batch
from data.errors import DataError


class GlobalBatch:
    """All ranks' image embeddings, without gradient; gathering starts when this is made.

    embeds: of this rank's slots. valid: on the CPU, as loaders give it. dtype: of the products of
    the loss, on a GPU, for which one rank does not wait here where all its slots are good.
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
        self._own_good = int(np.count_nonzero(valid.numpy()))
        self._by_caption = model.text.loss.positives == "caption"
        self._valid = distributed.start_all_gather(distributed.send(valid, device))
        if device.type == "cuda" and dtype == torch.bfloat16:
            embeds = embeds.bfloat16()
        self._images = distributed.start_all_gather(embeds)
        self._concepts = distributed.start_all_gather(distributed.send(batch.concepts, device))
        self._texts_of = None
        if batch.slots is not None:
            counts = torch.from_numpy(np.bincount(batch.slots, minlength=self._size))
            self._texts_of = distributed.start_all_gather(distributed.send(counts, device))

    @property
    def images(self) -> Float[Tensor, "b d"]:
        """Embeddings of all good images. Raises `DataError` if none is good."""
        return self._arrived[0]

    def positives(self, slots: Int[Tensor, " m"]) -> Positives:
        """Which of all good images are positives of texts of these slots of this rank."""
        _, labels, rows = self._arrived
        return Positives(labels, labels[rows[slots]], *self._counts)

    def rows(self, slots: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The rows among all good images of good slots of this rank."""
        return self._arrived[2][slots]

    @cached_property
    def _counts(self) -> tuple[Int[Tensor, " b"] | None, int]:
        """How many texts have each image's label, and how many texts there are in all."""
        if self._texts_of is None:
            return None, 0
        texts_of = self._texts_of()[self._good[0]]
        _, label = self._arrived[1].unique(return_inverse=True)
        return torch.zeros_like(texts_of).index_add(0, label, texts_of)[label], int(texts_of.sum())

    @cached_property
    def _good(self) -> tuple[Bool[Tensor, " b"], int]:
        """Which slots of all ranks are good, and how many. Raises `DataError` if none is."""
        valid = self._valid()
        count = self._own_good if distributed.world_size() == 1 else int(valid.sum())
        if not count:
            raise DataError(f"step {self._step}: not one sample of the batch could be read")
        return valid, count

    @cached_property
    def _arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """Good images, their labels, and the row among them of each own slot."""
        (valid, count), images, concepts = self._good, self._images(), self._concepts()
        rows = valid.long().cumsum(0) - 1
        first = distributed.rank() * self._size
        if count < len(valid):
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
        whitened = model.whiten(distributed.send(features, model.device))
        self._own: Tensor | None = None  # good images, as the head reads them
        self._slopes: Tensor | None = None
        if model.head is None:
            self.embeds = F.normalize(whitened, dim=-1)
            return
        with torch.no_grad():
            (self.embeds,) = engine(None, whitened)
        good = torch.from_numpy(np.flatnonzero(valid.numpy()))
        self._slots = distributed.send(good, model.device)
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
