"""Texts as token ids: tokenizers of transformers and of open_clip, padding, groups."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class HFTokenizer:
    """A transformers tokenizer, cut at a length."""

    hf: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without padding."""
        if not texts:
            return []
        return self.hf(list(texts), truncation=True, max_length=self.context_length)["input_ids"]

    @property
    def pad_id(self) -> int:
        return int(self.hf.pad_token_id or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Equal where equal texts give equal ids."""
        facts = {"length": self.context_length, "class": type(self.hf).__name__}
        if hasattr(self.hf, "backend_tokenizer"):  # its vocabulary, rules and special tokens
            facts |= json.loads(self.hf.backend_tokenizer.to_str())
            del facts["truncation"], facts["padding"]  # what the last call left there
        else:
            facts |= {"vocabulary": self.hf.get_vocab(), "special": self.hf.special_tokens_map}
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class OpenClipTokenizer:
    """open_clip's own tokenizer, as an architecture uses it."""

    architecture: str
    context_length: int
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without padding."""
        if not texts:
            return []
        ids = open_clip.tokenize(list(texts), self.context_length)
        lengths = (ids != self.pad_id).sum(1)
        return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]

    @property
    def fingerprint(self) -> str:
        named = f"open_clip/{self.architecture}/{self.context_length}"
        return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Token ids and which of them are text (1) rather than padding (0)."""

    ids: Int[Tensor, "b n"]
    mask: Int[Tensor, "b n"]

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(
            self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True)
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TokenGroups:
    """Texts in groups of like length, so that each pads to its own longest only.

    The first `count` texts of all groups together count; what follows fills groups up, because
    every rank must run the same number of forwards.
    """

    groups: tuple[Tokens, ...]
    count: int

    @classmethod
    def of(cls, tower: Any, ids: list[list[int]], num_groups: int = 1) -> "TokenGroups":
        """Pad the ids of texts that are already sorted by length."""
        filled = ids + tower.tokenizer([""]) * (num_groups - len(ids))
        bounds = [round(i * len(filled) / num_groups) for i in range(num_groups + 1)]
        return cls(tuple(tower.pad(filled[a:b]) for a, b in pairwise(bounds)), len(ids))

    def to(self, device: torch.device | str) -> "TokenGroups":
        return TokenGroups(tuple(group.to(device) for group in self.groups), self.count)


def look_up(embedding: nn.Module, groups: Sequence[Tokens]) -> list[Float[Tensor, "b n w"]]:
    """The words' vectors of each group, by one look-up: each has a gradient as large as the
    vocabulary."""
    ids = torch.cat([group.ids.flatten() for group in groups])
    words = embedding(ids).split([group.ids.numel() for group in groups])
    return [w.view(*g.ids.shape, -1) for w, g in zip(words, groups, strict=True)]


def padded(ids: list[list[int]], length: int, pad_id: int) -> Tokens:
    rows = torch.full((len(ids), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(ids):
        rows[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return Tokens(rows, mask)
