"""Which text tower, and how it reads."""

from dataclasses import dataclass
from typing import Literal

from data.errors import UsageError

Pooling = Literal["cls", "mean", "eos"]


@dataclass(frozen=True)
class TextConfig:
    """Which text tower, and how it reads."""

    tower: str = "minilm"
    """minilm (offline default), hf:FOLDER, hf:HUB_NAME, open_clip:local-dir:FOLDER,
    open_clip:ARCHITECTURE@FILE, or open_clip:ARCHITECTURE with random weights.
    CLIP and SigLIP bring their pooling, and their projection if the image tower is as wide.
    With init_samples 0, training starts in their own embedding space."""
    pooling: Pooling = "mean"
    """For transformers encoders: first token, mean of the tokens, or last token."""
    context_length: int = 32
    """Longest text in tokens; longer ones are cut. SigLIP reads as many as it was trained on."""
    dropout: float = 0.0
    """Dropout of a transformers encoder in training."""
    freeze_embeddings: bool = False
    """Keep token embeddings fixed: faster, and words not in the training data stay usable."""
    frozen: bool = False
    """Keep the whole tower: with data.features each caption is read once, and a step costs the
    heads alone."""
    head: Literal["none", "mlp"] = "none"
    """What is trained between the tower and its projection: nothing, or a gated MLP, which starts
    at what none gives."""
    trainable: tuple[str, ...] = ()
    """Regular expressions; of the tower, parameters whose name contains a match are trained.
    Empty: all."""
    decay_to_start: float = 0.0
    """Weight decay of the tower, norms and biases too, towards its published weights, in place of
    optim.weight_decay towards 0 (L2-SP, arXiv:1802.01483); 0: none."""
    lora: int = 0
    """Rank of the matrices that train beside the tower's linear layers, in place of the tower
    (LoRA, arXiv:2106.09685); 0: none. Needs flexilit[lora]."""

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise UsageError(f"text.context_length {self.context_length}: at least 3 tokens")
        if self.frozen and (self.trainable or self.decay_to_start or self.dropout):
            raise UsageError(
                "text.frozen keeps the whole tower; leave out text.trainable and decay_to_start, "
                "and set text.dropout to 0"
            )
        if not self.decay_to_start >= 0:
            raise UsageError(f"text.decay_to_start {self.decay_to_start}: must be at least 0")
        if self.lora < 0:
            raise UsageError(f"text.lora {self.lora}: a rank, at least 0")
        if self.lora and (self.frozen or self.trainable or self.decay_to_start):
            raise UsageError(
                "text.lora keeps the tower's own weights and trains others; leave out text.frozen, "
                "text.trainable and text.decay_to_start"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"text.dropout {self.dropout}: allowed are values from 0 up to 1")
