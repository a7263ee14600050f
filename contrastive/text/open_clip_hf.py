"""The text tower of an open_clip model that is an encoder of transformers: RoBERTa, BERT, ..."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.files.open_clip import OpenClipCheckpoint
from contrastive.files.transformers import first_line
from contrastive.files.weights import load_weights
from contrastive.text.config import Pooling
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import PaddedTokens
from contrastive.text.tokenizers import OpenClipHFTokenizer, load_hf_tokenizer
from contrastive.text.transformers import HFTextTower, set_dropout
from data.errors import UsageError

POOLINGS: dict[str, Pooling] = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls"}
DEFAULTS = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": 77}


class OpenClipHFTextTower(HFTextTower):
    """An encoder of transformers, and open_clip's two layers after its pooling where it has them.

    A linear projection is none of the tower: it is `own_projection`.
    """

    tokenizer: OpenClipHFTokenizer

    def __init__(
        self,
        net: Any,
        tokenizer: OpenClipHFTokenizer,
        pooling: Pooling,
        layers: tuple[int, int] | None,
    ) -> None:
        """layers: widths of the hidden and the last layer of the projection."""
        super().__init__(net, tokenizer.hf, pooling, tokenizer.context_length)
        self.tokenizer, self.layers = tokenizer, layers
        self.head: nn.Module = nn.Identity()
        if layers:
            hidden, out = layers
            self.head = nn.Sequential(
                nn.Linear(self.width, hidden, bias=False),
                nn.GELU(),
                nn.Linear(hidden, out, bias=False),
            )
            self.width = out

    @classmethod
    def of(
        cls, checkpoint: OpenClipCheckpoint, context_length: int, dropout: float = 0.0
    ) -> "OpenClipHFTextTower":
        """The text tower of an open_clip model, with its weights; the encoder's configuration and
        tokenizer are in the checkpoint's folder, or found by their names."""
        what = f"open_clip:{checkpoint.name}"
        facts = {**DEFAULTS, **checkpoint.model["text_cfg"]}
        pooling = POOLINGS.get(facts["hf_pooler_type"])
        options = facts.get("tokenizer_kwargs") or {}
        strange = [facts["hf_pooler_type"]] if pooling is None else []
        strange += [key for key in options if key != "clean"] + (
            ["tokenizer_mode"] if facts.get("tokenizer_mode") else []
        )
        if pooling is None or strange:
            raise UsageError(
                f"{what} cannot be used as text tower: it has {strange[0]}; allowed: "
                f"{', '.join(POOLINGS)}, with a tokenizer of transformers that needs no option but "
                "clean"
            )
        source = _source(checkpoint.folder, "config.json", facts["hf_model_name"])
        net = _network(source, what, dropout)
        named = facts.get("hf_tokenizer_name") or facts["hf_model_name"]
        source = _source(checkpoint.folder, "tokenizer_config.json", named)
        limit = getattr(net.config, "max_position_embeddings", None) or context_length
        length = min(context_length, int(facts["context_length"]), limit)
        tokenizer = OpenClipHFTokenizer(load_hf_tokenizer(source, what), length, **options)
        weights = checkpoint.part("text")
        layers = None
        if "proj.0.weight" in weights:
            layers = len(weights["proj.0.weight"]), len(weights["proj.2.weight"])
        tower = cls(net, tokenizer, pooling, layers)
        prefix = "transformer."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        own = {k: v for k, v in own.items() if k.split(".")[0] != "pooler"}
        own.pop("embeddings.position_ids", None)  # a buffer of earlier versions of transformers
        load_weights(tower.net, own, what)
        tower.own_projection = weights.get("proj.weight", torch.eye(tower.width))
        if layers:
            head = {k.removeprefix("proj."): v for k, v in weights.items() if k.startswith("proj.")}
            load_weights(tower.head, head, what)
        tower.own_logits = checkpoint.logits
        return tower

    @classmethod
    def build(cls, config: dict[str, Any], folder: Path) -> "OpenClipHFTextTower":
        """Rebuild, without weights, the tower of `config()`; its tokenizer is in `folder`."""
        from transformers import AutoConfig, AutoModel

        facts = dict(config["net"])
        net = AutoModel.from_config(AutoConfig.for_model(facts.pop("model_type"), **facts))
        hf = load_hf_tokenizer(str(folder), f"the model in {folder}")
        tokenizer = OpenClipHFTokenizer(hf, config["context_length"], config["clean"])
        layers = config["layers"]
        return cls(net, tokenizer, config["pooling"], tuple(layers) if layers else None)

    def forward(self, groups: Sequence[PaddedTokens]) -> Float[Tensor, "m w"]:
        return self.head(super().forward(groups))

    def forward_packed(self, tokens: PackedTokens) -> Float[Tensor, "m w"]:
        return self.head(super().forward_packed(tokens))

    def config(self) -> dict[str, Any]:
        own = {"kind": "open_clip_hf", "clean": self.tokenizer.clean, "layers": self.layers}
        return super().config() | own


def _source(folder: Path | None, file: str, name: str) -> str:
    """The checkpoint's folder where it holds this file, else the name."""
    return str(folder) if folder is not None and (folder / file).is_file() else name


def _network(source: str, what: str, dropout: float) -> Any:
    """An untrained encoder by its configuration, with this dropout."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the configuration {source} of {what}'s text tower cannot be loaded: "
            f"{first_line(error)}"
        ) from error
    set_dropout(config, dropout)
    if config.is_encoder_decoder:
        raise UsageError(f"{what} reads texts by an encoder-decoder; an encoder is needed")
    return AutoModel.from_config(config)
