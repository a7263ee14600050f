"""Image-text models of other libraries: their towers, tokenizer, projections and logit scale."""

from contrastive.model.config import LossConfig
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.vision.load import load_vision_tower
from contrastive.vision.tower import VisionTower
from data.errors import UsageError

MAX_SCALE = 100.0  # that a model of ours has; SigLIP's are up to 118, which no ranking notices
LONGEST = 1 << 20  # tokens; each tower cuts this to its own context length


def load_pretrained(spec: str) -> tuple[VisionTower, TextEncoder, LossConfig]:
    """What a model is made of.

    spec: a CLIP or SigLIP of open_clip (`open_clip:ARCHITECTURE@FILE`,
    `open_clip:ARCHITECTURE@TAG`, `open_clip:local-dir:FOLDER`) or of transformers
    (`transformers:FOLDER_OR_HUB_NAME`). At its own patch size its embeddings are the library's. It
    offers no other; asked for one, PI-resize makes it up without training. Raises `UsageError` for
    what is no model of both images and texts.
    """
    kind, _, rest = spec.partition(":")
    vision = load_vision_tower(spec).offer_own_size()
    named = f"hf:{rest}" if kind == "transformers" else spec
    text = load_text_tower(TextConfig(tower=named, context_length=LONGEST))
    own = text.own_projection
    if own is None or text.own_logits is None:
        raise UsageError(
            f"{spec} has an image tower, but no text tower that leads into the same space; allowed "
            "as a model: a whole CLIP or SigLIP"
        )
    if len(own) != vision.embed_dim:
        raise UsageError(
            f"{spec}: its images have width {vision.embed_dim}, its texts {len(own)}; allowed as a "
            "model: a CLIP or SigLIP with one space"
        )
    scale, bias = text.own_logits
    loss = LossConfig(
        kind="softmax" if bias is None else "sigmoid",
        temperature_init=min(scale, MAX_SCALE),
        bias_init=LossConfig.bias_init if bias is None else bias,
    )
    return vision, TextEncoder(text, vision.embed_dim), loss
