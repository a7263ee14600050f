"""Text towers of transformers: any encoder, and the text models of CLIP and SigLIP."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.files.transformers import first_line, no_progress_bars
from contrastive.text import packing
from contrastive.text.config import Pooling, TextConfig
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import PaddedTokens, embed_tokens, pad_tokens
from contrastive.text.tokenizers import HFTokenizer
from contrastive.text.tower import TextTower
from data.errors import UsageError
from data.token_ids import TokenIds

SIGLIPS = ("siglip_text_model", "siglip2_text_model")


class HFTextTower(TextTower):
    """An encoder of transformers and its tokenizer."""

    tokenizer: HFTokenizer

    def __init__(self, net: Any, tokenizer: Any, pooling: Pooling, context_length: int) -> None:
        super().__init__()
        net.pooler = None  # a head for another task, unused here
        self.net, self.pooling = net, pooling
        self._attention = net.config._attn_implementation
        self.tokenizer = HFTokenizer(tokenizer, context_length)
        self.width = int(net.config.hidden_size)
        self.own_projection = None
        self._first_position = packing.first_position(net.config)
        self._compiled: Callable[..., Any] | None = None  # blocks, for packed texts
        packing.register()

    @property
    def can_pack(self) -> bool:  # type: ignore[override]
        return self._first_position is not None

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.net.named_parameters() if "embeddings." in name]

    def pad(self, ids: TokenIds) -> PaddedTokens:
        return pad_tokens(ids, int(ids.lengths.max()), self.tokenizer.pad_id)

    def forward(self, groups: Sequence[PaddedTokens]) -> Float[Tensor, "m w"]:
        self._choose_attention()
        vectors = embed_tokens(self.net.get_input_embeddings(), groups)
        return torch.cat([self._pool(v, g.mask) for v, g in zip(vectors, groups, strict=True)])

    def forward_packed(self, tokens: PackedTokens) -> Float[Tensor, "m w"]:
        assert self._first_position is not None
        self._attend_by(packing.ATTENTION)
        with packing.blocks_by(self.net, self._compiled):
            vectors = packing.read_packed(self.net, tokens, self._first_position)
        return packing.pool_packed(vectors, tokens, self.pooling)

    def compile_packed(self, on: bool = True) -> None:
        self._compiled = packing.compiled_blocks(self.net) if on else None

    def compile_net(self) -> None:
        self.net.compile(dynamic=True)

    def _choose_attention(self) -> None:
        """Plain attention for bfloat16 on a CPU: the fused one's backward pass over 16 tokens costs
        more than all the rest of a step (benchmarks/text_attention.py)."""
        device = next(self.net.parameters()).device.type
        plain = device == "cpu" and torch.is_autocast_enabled("cpu")
        self._attend_by("eager" if plain else self._attention)

    def _attend_by(self, wanted: str) -> None:
        if self.net.config._attn_implementation != wanted:
            self.net.set_attn_implementation(wanted)

    def _pool(self, vectors: Float[Tensor, "b n w"], mask: Int[Tensor, "b n"]) -> Tensor:
        hidden = self.net(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "eos":
            # the last 1 of the mask: padding may stand on either side
            last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    @property
    def reads_padding(self) -> bool:
        """Whether padding changes the result, so that texts must have one length."""
        return self.net.config.model_type in SIGLIPS

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
    """The text model of a CLIP or SigLIP of transformers, with its own pooling."""

    def __init__(self, net: Any, tokenizer: Any, context_length: int) -> None:
        super().__init__(net, tokenizer, "eos", context_length)
        if net.config.model_type in SIGLIPS:
            self.width = int(net.config.projection_size)

    def pad(self, ids: TokenIds) -> PaddedTokens:
        """To the context length for SigLIP, which was trained to read padding like text, on the
        side that its tokenizer says."""
        if not self.reads_padding:
            return super().pad(ids)
        length = self.tokenizer.context_length
        padded = pad_tokens(ids, length, self.tokenizer.pad_id)
        if self.tokenizer.hf.padding_side == "right":
            return padded
        places = (torch.arange(length) + padded.mask.sum(1, keepdim=True)) % length
        return PaddedTokens(padded.ids.gather(1, places), padded.mask.gather(1, places))

    def forward(self, groups: Sequence[PaddedTokens]) -> Float[Tensor, "m w"]:
        """One vector per text; no mask, since CLIP never reads what follows its end token."""
        self._choose_attention()
        return torch.cat([self.net(input_ids=group.ids).pooler_output for group in groups])

    def config(self) -> dict[str, Any]:
        return super().config() | {"kind": "clip"}


def load_transformers_tower(name: str, cfg: TextConfig) -> HFTextTower:
    """The encoder in a folder or of a hub name, with its weights. safetensors only: untrusted
    weights are never unpickled."""
    net, tokenizer = load_network(name, cfg)
    if net.config.model_type in ("clip", "siglip", "siglip2"):
        return text_half(net, tokenizer, cfg.context_length)
    limit = getattr(net.config, "max_position_embeddings", None) or cfg.context_length
    return HFTextTower(net, tokenizer, cfg.pooling, min(cfg.context_length, limit))


def load_network(name: str, cfg: TextConfig) -> tuple[Any, Any]:
    """transformers' network, which may hold more than texts, and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        set_dropout(config, cfg.dropout)
        if config.is_encoder_decoder:
            raise UsageError(
                f"text tower {cfg.tower!r} is an encoder-decoder; an encoder is needed"
            )
        # a download keeps its progress bar
        with no_progress_bars() if Path(name).is_dir() else nullcontext():
            net = AutoModel.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        return net, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UsageError:
        raise
    except Exception as error:  # damaged files fail in many ways, some of them bare exceptions
        raise UsageError(f"cannot load text tower {cfg.tower!r}: {first_line(error)}") from error


def set_dropout(config: Any, dropout: float) -> None:
    """Every kind of dropout of a configuration of transformers becomes `dropout`, in place."""
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float | int):
            setattr(config, key, dropout)


def text_half(net: Any, tokenizer: Any, context_length: int) -> ClipTextTower:
    """The text half of a CLIP or SigLIP model, and its projection."""
    limit = net.text_model.config.max_position_embeddings
    siglip = net.config.model_type != "clip"
    length = limit if siglip else min(context_length, limit)
    tower = ClipTextTower(net.text_model, tokenizer, length)
    tower.own_projection = torch.eye(tower.width) if siglip else net.text_projection.weight.detach()
    bias = float(net.logit_bias.detach()) if siglip else None
    tower.own_logits = float(net.logit_scale.detach().exp()), bias
    return tower


def build_transformers_tower(config: dict[str, Any], folder: Path) -> HFTextTower:
    """Rebuild, without weights, the tower of `config()`; its tokenizer is in `folder`."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    facts = dict(config["net"])
    shape = AutoConfig.for_model(facts.pop("model_type"), **facts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged one raises bare exceptions, too
        raise UsageError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); copy the folder again"
        ) from error
    if config["kind"] == "clip":
        from transformers import CLIPTextModel, Siglip2TextModel, SiglipTextModel

        siglips: dict[str, Any] = dict(
            zip(SIGLIPS, (SiglipTextModel, Siglip2TextModel), strict=True)
        )
        own = siglips.get(shape.model_type, CLIPTextModel)
        return ClipTextTower(own(shape), tokenizer, config["context_length"])
    net = AutoModel.from_config(shape)
    return HFTextTower(net, tokenizer, config["pooling"], config["context_length"])
