"""The text tower of an open_clip model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from open_clip.model import _build_text_tower
from torch import Tensor, nn

from contrastive.open_clip_files import OpenClipCheckpoint, architecture_config
from contrastive.tokenizers import OpenClipTokenizer, Tokens, padded
from contrastive.weights import load_weights
from data.errors import UsageError


class OpenClipTextTower(nn.Module):
    """open_clip's text transformer up to its own pooling."""

    def __init__(
        self, architecture: str, context_length: int, model: dict[str, Any] | None = None
    ) -> None:
        """model: what open_clip builds it from; not given: as it knows the architecture."""
        super().__init__()
        self.model = architecture_config(architecture) if model is None else model
        facts = dict(self.model.get("text_cfg", {}))
        for name in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls"):
            if facts.get(name):
                raise UsageError(
                    f"open_clip:{architecture} cannot be used as text tower: it has {name}; "
                    "allowed: one with open_clip's own tokenizer and transformer, e.g. ViT-B-32"
                )
        length = min(context_length, int(facts.get("context_length", 77)))
        self.tokenizer = OpenClipTokenizer(architecture, length)
        facts |= {"context_length": length, "proj_type": "none", "output_tokens": False}
        self.net: Any = _build_text_tower(0, facts, self.model.get("quick_gelu", False))
        self.width = int(self.net.width)
        self.projection_start: Tensor | None = None

    @classmethod
    def of(cls, checkpoint: OpenClipCheckpoint, context_length: int) -> "OpenClipTextTower":
        """The text tower of an open_clip model, with its weights."""
        tower = cls(checkpoint.name, context_length, checkpoint.model)
        weights = checkpoint.part("text")
        own = weights.pop("text_projection", None)
        if "positional_embedding" in weights:
            length = tower.tokenizer.context_length
            weights["positional_embedding"] = weights["positional_embedding"][:length]
        load_weights(tower.net, weights, f"open_clip:{checkpoint.name}")
        tower.projection_start = None if own is None else own.T
        return tower

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of token and position embeddings."""
        return [*self.net.token_embedding.parameters(), self.net.positional_embedding]

    def pad(self, ids: list[list[int]]) -> Tokens:
        """Texts as one tensor, as wide as the context: its mask fits no shorter text."""
        return padded(ids, self.tokenizer.context_length, self.tokenizer.pad_id)

    def forward(self, groups: Sequence[Tokens]) -> Float[Tensor, "m w"]:
        """One vector per text: causal, pooled at its end token, so padding is never read."""
        return self.net(torch.cat([group.ids for group in groups]))

    def config(self) -> dict[str, Any]:
        return {
            "kind": "open_clip",
            "architecture": self.tokenizer.architecture,
            "context_length": self.tokenizer.context_length,
            "model": self.model,
        }

    def save_tokenizer(self, folder: Path) -> None:
        """open_clip ships its vocabulary."""
