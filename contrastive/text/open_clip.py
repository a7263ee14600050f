"""The text tower of an open_clip model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.files.open_clip import OpenClipCheckpoint, architecture_config
from contrastive.files.weights import load_weights
from contrastive.part_imports import import_alone
from contrastive.text.padding import PaddedTokens, embed_tokens, pad_tokens
from contrastive.text.tokenizers import (
    OpenClipHFTokenizer,
    OpenClipTokenizer,
    load_hf_tokenizer,
)
from contrastive.text.tower import TextTower
from data.errors import UsageError
from data.token_ids import TokenIds

# What a `text_cfg` says of the tokenizer and of encoders of transformers; the network ignores it.
NOT_OF_NET = (
    "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "final_ln_after_pool",
    "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
)  # fmt: skip


class OpenClipTextTower(TextTower):
    """open_clip's text transformer up to its own pooling."""

    tokenizer: OpenClipTokenizer | OpenClipHFTokenizer

    def __init__(
        self,
        architecture: str,
        context_length: int,
        model: dict[str, Any] | None = None,
        hf_folder: Path | None = None,
    ) -> None:
        """model: what open_clip builds it from. Not given: what it knows of the architecture.
        hf_folder: with the tokenizer, where that is one of transformers. Not given: by its name."""
        super().__init__()
        self.architecture = architecture
        self.model = architecture_config(architecture) if model is None else model
        facts = dict(self.model.get("text_cfg", {}))
        for name in ("hf_model_name", "embed_cls", "tokenizer_mode"):
            if facts.get(name):
                raise UsageError(
                    f"open_clip:{architecture} cannot be used as text tower: it has {name}; "
                    "allowed: one with open_clip's own transformer, e.g. ViT-B-32"
                )
        length = min(context_length, int(facts.get("context_length", 77)))
        self.tokenizer = self._find_tokenizer(architecture, facts, length, hf_folder)
        biased = bool(facts.get("proj_bias"))  # such a projection stays in the network
        facts |= {"context_length": length, "output_tokens": False}
        facts |= {} if biased else {"proj_type": "none"}
        out = int(self.model["embed_dim"]) if biased else 0
        self.net: Any = _build_net(out, facts, self.model.get("quick_gelu", False))
        self.width = out or int(self.net.width)
        self.own_projection = None

    @staticmethod
    def _find_tokenizer(
        architecture: str, facts: dict[str, Any], length: int, hf_folder: Path | None
    ) -> OpenClipTokenizer | OpenClipHFTokenizer:
        """open_clip's own, or one of transformers."""
        name, options = facts.get("hf_tokenizer_name"), facts.get("tokenizer_kwargs") or {}
        if not name and not options:
            return OpenClipTokenizer(architecture, length)
        strange = [key for key in options if key not in ("clean", "strip_sep_token")]
        if strange or not name:
            raise UsageError(
                f"open_clip:{architecture} cannot be used as text tower: its tokenizer has "
                f"{strange[0] if strange else 'tokenizer_kwargs'}; allowed: clean, strip_sep_token"
            )
        hf = load_hf_tokenizer(str(hf_folder or name), f"open_clip:{architecture}")
        return OpenClipHFTokenizer(hf, length, **options)

    @classmethod
    def of(cls, checkpoint: OpenClipCheckpoint, context_length: int) -> "OpenClipTextTower":
        """The text tower of an open_clip model, with its weights."""
        tower = cls(checkpoint.name, context_length, checkpoint.model, checkpoint.folder)
        weights = checkpoint.part("text")
        own = weights.pop("text_projection", None)
        if "positional_embedding" in weights:
            length = tower.tokenizer.context_length
            weights["positional_embedding"] = weights["positional_embedding"][:length]
        load_weights(tower.net, weights, f"open_clip:{checkpoint.name}")
        tower.own_projection = None if own is None else own.T
        unprojected = checkpoint.model["text_cfg"].get("proj_type") == "none"
        if "text_projection.weight" in weights or unprojected:
            tower.own_projection = torch.eye(tower.width)
        tower.own_logits = checkpoint.logits
        return tower

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [*self.net.token_embedding.parameters(), self.net.positional_embedding]

    @property
    def _reads_padding(self) -> bool:
        """Whether padding changes the result, as it does in SigLIP's and CoCa's towers."""
        net = self.net
        causal = net.attn_mask is not None and net.cls_emb is None
        return not causal or net.pool_type not in ("argmax", "eos")

    def pad(self, ids: TokenIds) -> PaddedTokens:
        """Pad to the longest text, or to the context length where padding is read."""
        width = self.tokenizer.context_length if self._reads_padding else int(ids.lengths.max())
        return pad_tokens(ids, width, self.tokenizer.pad_id)

    def forward(self, groups: Sequence[PaddedTokens]) -> Float[Tensor, "m w"]:
        if self._reads_padding:
            return self.net(torch.cat([group.ids for group in groups]))
        vectors = embed_tokens(self.net.token_embedding, groups)
        return torch.cat([self._read(v, g.ids) for v, g in zip(vectors, groups, strict=True)])

    def _read(self, vectors: Float[Tensor, "b n w"], ids: Int[Tensor, "b n"]) -> Tensor:
        """open_clip's forward with the mask cut to n tokens; the original always uses the
        full-context mask."""
        net, n = self.net, ids.shape[1]
        read = net.transformer(vectors + net.positional_embedding[:n], net.attn_mask[:n, :n])
        pool = import_alone("open_clip.transformer").text_global_pool
        vectors = pool(net.ln_final(read), ids, net.pool_type, eos_token_id=net.eos_id)
        return vectors if net.text_projection is None else net.text_projection(vectors)

    def compile_net(self) -> None:
        (self.net if self._reads_padding else self.net.transformer).compile(dynamic=True)

    def config(self) -> dict[str, Any]:
        return {
            "kind": "open_clip",
            "architecture": self.architecture,
            "context_length": self.tokenizer.context_length,
            "model": self.model,
        }

    def save_tokenizer(self, folder: Path) -> None:
        """open_clip ships its own vocabulary."""
        if isinstance(self.tokenizer, OpenClipHFTokenizer):
            self.tokenizer.hf.save_pretrained(folder)


def _build_net(output_dim: int, facts: dict[str, Any], quick_gelu: bool) -> Any:
    """What open_clip builds of a `text_cfg`, without importing transformers as its factory does.
    Raises TypeError for what it has no parameter for."""
    parts = import_alone("open_clip.transformer")
    activation: Any = parts.QuickGELU if quick_gelu else nn.GELU
    norm: Any = parts.LayerNorm
    facts = {name: value for name, value in facts.items() if name not in NOT_OF_NET}
    if (options := facts.pop("act_kwargs", None)) is not None:
        activation = partial(activation, **options)
    if options := facts.pop("norm_kwargs", None):
        norm = partial(norm, **options)
    return parts.TextTransformer(
        **facts, output_dim=output_dim, act_layer=activation, norm_layer=norm
    )


def check_tokenizer(tower: TextTower, to: str) -> None:
    """Raises `UsageError` where open_clip changes texts before a tokenizer of transformers reads
    them, which `to` does not know of."""
    if isinstance(tower.tokenizer, OpenClipHFTokenizer):
        raise UsageError(
            f"{to} cannot express this text tower: open_clip cleans texts before its tokenizer "
            "reads them; try open_clip"
        )
