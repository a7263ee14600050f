"""Token ids as tensors: texts padded to one length, and batches in groups of like length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.distributed import send
from data.token_ids import TokenIds


@dataclass(frozen=True)
class PaddedTokens:
    """Token ids of texts padded to one length, and a mask: 1 where text, 0 where padding."""

    ids: Int[Tensor, "b n"]
    mask: Int[Tensor, "b n"]

    def to(self, device: torch.device | str) -> "PaddedTokens":
        """In one copy, for which the processor does not wait."""
        if torch.device(device).type != "cuda" or self.ids.is_cuda:
            return PaddedTokens(self.ids.to(device), self.mask.to(device))
        return PaddedTokens(*send(torch.stack([self.ids, self.mask]), device))

    def __len__(self) -> int:
        return len(self.ids)


def pad_tokens(ids: TokenIds, length: int, pad_id: int) -> PaddedTokens:
    """Texts of at most `length` tokens, padded to it on the right."""
    rows, mask = ids.padded(length, pad_id)
    return PaddedTokens(torch.from_numpy(rows), torch.from_numpy(mask))


def padding_mask(ids: Int[Tensor, "b n"], tokenizer: Any) -> Int[Tensor, "b n"]:
    """1 where text, 0 where padding, of texts that `tokenizer`'s library has padded on one side.

    Padding is what stands at an end of a row: within a text the padding's id is a token, and so it
    is where the tokenizer itself begins or ends its texts with it.
    """
    pad_id, (empty,) = tokenizer.pad_id, tokenizer([""])
    is_text = ids != pad_id
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = places.where(is_text, ids.shape[1]).amin(1) - int(empty[:1] == [pad_id])
    last = places.where(is_text, -1).amax(1) + int(empty[-1:] == [pad_id])
    first = first.where(is_text.any(1), 0)  # an empty text, where its tokens are the padding's
    last = last.where(is_text.any(1), len(empty) - 1)
    return ((places >= first[:, None]) & (places <= last[:, None])).long()


@dataclass(frozen=True)
class TokenBatch:
    """Texts as a text tower reads them: in groups of similar length, each padded to its longest.

    Only the first `num_texts` texts of all groups belong to the batch. Empty texts after them fill
    up the groups, because every rank must run the same number of forwards.
    """

    groups: tuple[PaddedTokens, ...]
    num_texts: int

    @classmethod
    def of(cls, tower: Any, ids: TokenIds, num_groups: int = 1) -> "TokenBatch":
        """Group and pad, as `tower` does, the token ids of texts sorted by length."""
        filled, missing = ids, num_groups - len(ids)
        if missing > 0:
            filled = TokenIds.join([ids, *[TokenIds.of(tower.tokenizer([""]))] * missing])
        bounds = [round(i * len(filled) / num_groups) for i in range(num_groups + 1)]
        return cls(tuple(tower.pad(filled[a:b]) for a, b in pairwise(bounds)), len(ids))

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(tuple(group.to(device) for group in self.groups), self.num_texts)


def embed_tokens(
    embedding: nn.Module, groups: Sequence[PaddedTokens]
) -> list[Float[Tensor, "b n w"]]:
    """The embedding vectors of each group's tokens, looked up at once: the backward pass of every
    look-up makes a gradient as large as the vocabulary."""
    ids = torch.cat([group.ids.flatten() for group in groups])
    vectors = embedding(ids).split([group.ids.numel() for group in groups])
    return [v.view(*g.ids.shape, -1) for v, g in zip(vectors, groups, strict=True)]
