"""The side of the model that learns: text encoder, logit scale and bias."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.model.config import LossConfig
from contrastive.text.encoder import TextEncoder, TextVectors
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch


class TextSide(nn.Module):
    """What trains: the text encoder, the logit scale and, for sigmoid, the logit bias."""

    def __init__(self, encoder: TextEncoder, loss: LossConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        # Shape (1,): ZeRO on gloo cannot hold a 0-dimensional parameter.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(loss.temperature_init)]))
        if loss.kind == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([loss.bias_init]))

    def scale(self) -> Float[Tensor, ""]:
        """The logit scale t, at most 100.

        Clamped here, because ZeRO's master copy would undo a clamp of the parameter. The gradient
        passes through, so that a scale that overshot can come back.
        """
        log_scale = self.logit_scale[0]
        return (log_scale + (log_scale.clamp(max=math.log(100)) - log_scale).detach()).exp()

    def forward(
        self, tokens: TokenBatch | PackedTokens | TextVectors
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, ""], Float[Tensor, ""] | None]:
        """Text embeddings, the logit scale, and the bias of the sigmoid loss.

        Every parameter is read here and nowhere else in a step, because ZeRO-3 gathers them around
        this call.
        """
        text_embeds = self.encoder(tokens)
        with torch.autocast(text_embeds.device.type, enabled=False):
            bias = self.logit_bias[0] if self.loss.kind == "sigmoid" else None
            return text_embeds, self.scale(), bias
