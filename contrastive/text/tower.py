"""The base class of text towers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from contrastive.files.weights import hash_weights
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import PaddedTokens
from contrastive.text.tokenizers import HFTokenizer, OpenClipTokenizer
from data.token_ids import TokenIds


class TextTower(nn.Module):
    """From texts to one vector each, before the projection to the image tower's width.

    A new kind of tower is a subclass in a module of its own, and a line in `load`.
    """

    net: Any
    """The library's network."""
    tokenizer: HFTokenizer | OpenClipTokenizer
    width: int
    """Of its vectors."""
    own_projection: Tensor | None
    """(d, width): the projection that a checkpoint brings, from which ours starts."""
    own_logits: tuple[float, float | None] | None = None
    """(scale, bias) of the logits that a checkpoint of both images and texts brings; the bias None
    where it was trained with softmax."""

    locked = False

    can_pack = False
    """Whether it reads packed texts too, to the same vectors."""

    def lock(self) -> "TextTower":
        """Turn gradients off and stay in eval mode for good. Returns self."""
        self.requires_grad_(False)
        self.locked = True
        return self.eval()

    def train(self, mode: bool = True) -> "TextTower":
        return super().train(mode and not self.locked)

    @property
    def fingerprint(self) -> str:
        """Changes when the weights or the configuration change."""
        digest = hashlib.blake2b(json.dumps(self.config(), sort_keys=True).encode(), digest_size=8)
        hash_weights(digest, self.state_dict())
        return digest.hexdigest()

    def embedding_parameters(self) -> list[nn.Parameter]:
        """What `freeze_embeddings` freezes: of tokens, positions, types."""
        raise NotImplementedError

    def pad(self, ids: TokenIds) -> PaddedTokens:
        """Texts as one tensor, padded to the longest, or as this tower needs."""
        raise NotImplementedError

    def forward(self, groups: Sequence[PaddedTokens]) -> Float[Tensor, "m w"]:
        """One vector per text, group after group."""
        raise NotImplementedError

    def forward_packed(self, tokens: PackedTokens) -> Float[Tensor, "m w"]:
        """One vector per text, where it `can_pack`."""
        raise NotImplementedError

    def compile_packed(self, on: bool = True) -> None:
        """torch.compile the blocks that read packed texts, where it `can_pack`; off: no longer."""
        raise NotImplementedError

    def compile_net(self) -> None:
        """torch.compile what costs most, for texts of any length."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What `build_text_tower` rebuilds the tower from (JSON-able)."""
        raise NotImplementedError

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files that `build_text_tower` needs besides."""
        raise NotImplementedError
