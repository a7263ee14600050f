"""The batch of a training step and that of an evaluation step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from data.problems import add_counts
from data.token_ids import TokenIds


class LazyStrings(Sequence[str]):
    """Strings that are made when somebody asks for one: most training steps need none."""

    def __init__(self, length: int, make: Callable[[], list[str]]) -> None:
        self._length, self._make = length, make

    @cached_property
    def _strings(self) -> list[str]:
        return self._make()

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        return self._strings[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._strings == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list


@dataclass
class Batch:
    """This rank's part of one global batch.

    A bad sample keeps its slot in the global order, with `valid` False, zero pixels and an empty
    caption, so that all ranks always make the same steps.
    """

    step: int
    keys: Sequence[str]
    images: UInt8[Tensor, "b 3 s s"] | None  # not normalised; None where pixels are not read
    captions: Sequence[str]  # drawn for this epoch: one of each slot, "" where bad; or `slots`
    tokens: TokenIds  # their token ids; none where bad, or where the pipeline has no tokenizer
    concepts: Int[Tensor, " b"]  # int64: equal where the samples' lists of captions are equal
    valid: Bool[Tensor, " b"]
    shards: Int[Tensor, " b"]  # number in the pipeline's shard list
    indices: Int[Tensor, " b"]  # number of the sample in its shard
    views: Int[Tensor, " b"]  # which view of the image was drawn, 0: the image itself
    errors: dict[str, int] = field(default_factory=dict)  # bad samples met in this part, by kind
    labels: Int[Tensor, " b"] | None = None  # KEY.cls, -1 where none; None where not read
    slots: Int[np.ndarray, " t"] | None = None  # of each caption, ascending; None: one of each slot
    text_vectors: Float[Tensor, "t w"] | None = None  # of captions, by a frozen tower

    @property
    def caption_slots(self) -> Int[np.ndarray, " t"]:
        """The slot of each caption."""
        return np.arange(len(self)) if self.slots is None else self.slots

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory (torch's DataLoader calls this)."""
        return replace(
            self,
            images=None if self.images is None else self.images.pin_memory(),
            concepts=self.concepts.pin_memory(),
            valid=self.valid.pin_memory(),
            shards=self.shards.pin_memory(),
            indices=self.indices.pin_memory(),
            views=self.views.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
            text_vectors=None if self.text_vectors is None else self.text_vectors.pin_memory(),
        )

    @staticmethod
    def join(parts: "Sequence[Batch]") -> "Batch":
        """Consecutive parts of one step as one batch."""
        if len(parts) == 1:
            return parts[0]
        errors: dict[str, int] = {}
        for part in parts:
            add_counts(errors, part.errors)
        images = [part.images for part in parts if part.images is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        vectors = [part.text_vectors for part in parts if part.text_vectors is not None]
        slots: list[np.ndarray] = []
        first = 0
        for part in parts:
            if part.slots is not None:
                slots.append(part.slots + first)
            first += len(part)
        return Batch(
            step=parts[0].step,
            keys=[key for part in parts for key in part.keys],
            images=_cat(images) if images else None,
            captions=[caption for part in parts for caption in part.captions],
            tokens=TokenIds.join([part.tokens for part in parts]),
            concepts=_cat([part.concepts for part in parts]),
            valid=_cat([part.valid for part in parts]),
            shards=_cat([part.shards for part in parts]),
            indices=_cat([part.indices for part in parts]),
            views=_cat([part.views for part in parts]),
            errors=errors,
            labels=_cat(labels) if labels else None,
            slots=np.concatenate(slots) if slots else None,
            text_vectors=_cat(vectors) if vectors else None,
        )


@dataclass
class OpenBatch(Batch):
    """A part of a batch whose slots are being filled."""

    keys: list[str]
    captions: list[str]
    further: dict[int, list[str]] = field(default_factory=dict)  # slot -> captions after its first


class Cut(NamedTuple):
    """What an image is resized to, in pixels, and the patches that it is then cut into."""

    height: int
    width: int
    patch_size: int


Pixels: TypeAlias = UInt8[Tensor, "3 s s"] | list[tuple[Cut, UInt8[Tensor, "3 _h _w"]]]
"""Of one image: a square, or what it is by each cut."""


@dataclass
class ShapedImages:
    """Pixels of images of different shapes, not normalised, as one piece of memory, which crosses
    from a loader process and to a GPU in one go."""

    pixels: UInt8[Tensor, "3 n"]
    cuts: list[Cut]

    @staticmethod
    def of(images: Sequence[tuple[Cut, UInt8[Tensor, "3 _h _w"]]]) -> "ShapedImages":
        flat = [pixels.flatten(1) for _, pixels in images]
        return ShapedImages(torch.cat(flat, 1), [cut for cut, _ in images])

    def views(self, pixels: Tensor) -> list[Tensor]:
        """The images (3, h, w) in `pixels` (3, n), which are these elsewhere or normalised."""
        parts = pixels.split([cut.height * cut.width for cut in self.cuts], dim=1)
        return [p.view(3, c.height, c.width) for p, c in zip(parts, self.cuts, strict=True)]


@dataclass
class EvalBatch:
    """Good samples of one shard, in the shard's order; never empty, never of two shards."""

    keys: list[str]
    images: UInt8[Tensor, "b 3 s s"] | None  # not normalised; None where pixels are not read
    captions: list[tuple[str, ...]]  # all captions of each sample, () where there is none
    labels: Int[Tensor, " b"]  # KEY.cls, -1 where there is none
    shard: int  # number in the reader's shard list
    indices: Int[Tensor, " b"]  # number of the sample in its shard
    offsets: Int[Tensor, " b"]  # of the image member in the tar, bytes
    sizes: Int[Tensor, " b"]  # of the image member, bytes
    digests: Int[Tensor, " b"] | None = None  # `image_digest` of its bytes; None where not asked
    shaped: list[ShapedImages] = field(default_factory=list)
    """In place of `images`, of a reader that has `cuts`: the images by the first cut of each, by
    the second, ..."""

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "EvalBatch":
        """Its images in page-locked memory (torch's DataLoader calls this)."""
        return replace(
            self,
            images=None if self.images is None else self.images.pin_memory(),
            shaped=[replace(part, pixels=part.pixels.pin_memory()) for part in self.shaped],
        )


def batch_pixels(
    images: Sequence[Pixels],
) -> tuple[UInt8[Tensor, "b 3 s s"] | None, list[ShapedImages]]:
    """`images` and `shaped` of an `EvalBatch`."""
    squares = [image for image in images if isinstance(image, Tensor)]
    cut = [image for image in images if not isinstance(image, Tensor)]
    by_cut = [ShapedImages.of(part) for part in zip(*cut, strict=True)]
    return torch.stack(squares) if squares else None, by_cut


def _cat(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_pinned():
        return torch.cat(tensors)
    shape = (sum(len(t) for t in tensors), *tensors[0].shape[1:])
    return torch.cat(tensors, out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True))
