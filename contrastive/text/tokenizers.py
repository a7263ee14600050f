"""From texts to token ids: the tokenizers of transformers and of open_clip."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from contrastive.files.transformers import first_line
from contrastive.part_imports import import_alone
from data.errors import UsageError


@dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer of transformers; longer texts are cut."""

    hf: Any
    context_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without padding."""
        if not texts:
            return []
        return self.hf(list(texts), truncation=True, max_length=self.context_length)["input_ids"]

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is longer than the context, so that its end is not read."""
        if not texts:
            return []
        found = self.hf(list(texts), truncation=True, max_length=self.context_length)
        if found.encodings is not None:
            return [bool(text.overflowing) for text in found.encodings]
        longer = self.hf(list(texts), truncation=True, max_length=self.context_length + 1)
        return [len(ids) > self.context_length for ids in longer["input_ids"]]

    @property
    def pad_id(self) -> int:
        return int(self.hf.pad_token_id or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Equal where equal texts give equal ids."""
        text = json.dumps(self._facts(), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"length": self.context_length, "class": type(self.hf).__name__}
        if hasattr(self.hf, "backend_tokenizer"):  # its vocabulary, rules and special tokens
            facts |= json.loads(self.hf.backend_tokenizer.to_str())
            del facts["truncation"], facts["padding"]  # settings of the last call
        else:
            facts |= {"vocabulary": self.hf.get_vocab(), "special": self.hf.special_tokens_map}
        return facts


@dataclass(frozen=True)
class OpenClipHFTokenizer(HFTokenizer):
    """A tokenizer of transformers as open_clip uses it: texts are cleaned first."""

    clean: str = "whitespace"
    """open_clip's name of how."""
    strip_sep_token: bool = False
    """The separator counts as padding."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        rows = super().__call__(self._cleaned(texts))
        if not self.strip_sep_token:
            return rows
        return [[0 if i == self.hf.sep_token_id else i for i in row] for row in rows]

    def cut(self, texts: Sequence[str]) -> list[bool]:
        return super().cut(self._cleaned(texts))

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        clean = import_alone("open_clip.tokenizer").get_clean_fn(self.clean)
        return [clean(text) for text in texts]

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"clean": self.clean, "strip": self.strip_sep_token}


def cut_texts(tokenizer: Any, texts: Sequence[str]) -> list[bool]:
    """What `tokenizer.cut` says, which reads only the texts again that may be too long."""
    # a token is a byte at least, and two mark the ends
    long = [len(text.encode(errors="replace")) + 2 > tokenizer.context_length for text in texts]
    found = iter(
        tokenizer.cut([text for text, is_long in zip(texts, long, strict=True) if is_long])
    )
    return [is_long and next(found) for is_long in long]


def load_hf_tokenizer(name: str, what: str) -> Any:
    """The tokenizer in a folder or of a hub name. Raises `UsageError`; what: it is for."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged one raises bare exceptions, too
        raise UsageError(
            f"the tokenizer {name} of {what} cannot be loaded: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class OpenClipTokenizer:
    """open_clip's own tokenizer; longer texts are cut."""

    architecture: str
    context_length: int
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without padding."""
        return self._read(texts, self.context_length)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is longer than the context, so that its end is not read."""
        longer = self._read(texts, self.context_length + 1)
        return [len(ids) > self.context_length for ids in longer]

    @staticmethod
    def _read(texts: Sequence[str], context_length: int) -> list[list[int]]:
        if not texts:
            return []
        tokenize = import_alone("open_clip.tokenizer").tokenize
        end = int(tokenize([""], 2)[0, 1])
        rows = tokenize(list(texts), context_length).tolist()
        # every text ends with its last end token; the padding's id is also that of "!" in a word
        return [row[: len(row) - row[::-1].index(end)] for row in rows]

    @property
    def fingerprint(self) -> str:
        # "whole": ids kept under the name without it may lack a text's end
        named = f"open_clip/{self.architecture}/{self.context_length}/whole"
        return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()
