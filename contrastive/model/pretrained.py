"""Image-text models of other libraries: their towers, tokenizer, projections and logit scale."""

from contrastive.files.open_clip import read_open_clip
from contrastive.model.config import LossConfig
from contrastive.model.without_init import WithoutInit
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import open_clip_text_tower
from contrastive.text.tower import TextTower
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.transform import VERSIONS

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
    vision, text = _of_open_clip(rest) if kind == "open_clip" else _of_transformers(rest)
    vision.use_transform(VERSIONS[-1]).offer_own_size().lock()
    own = text.own_projection
    if own is None or text.own_logits is None:
        raise _no_model(spec)
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


def _of_open_clip(rest: str) -> tuple[VisionTower, TextTower]:
    from contrastive.vision.formats.open_clip import open_clip_tower

    checkpoint = read_open_clip(rest)
    with WithoutInit():
        return open_clip_tower(checkpoint, rest), open_clip_text_tower(checkpoint, LONGEST)


def _of_transformers(name: str) -> tuple[VisionTower, TextTower]:
    from contrastive.text.transformers import load_network, text_half
    from contrastive.vision.formats.transformers import image_half, read_model_config

    spec = f"transformers:{name}"
    config = read_model_config(name)
    if config.model_type not in ("clip", "siglip", "siglip2"):
        raise _no_model(spec)
    net, tokenizer = load_network(name, TextConfig(tower=spec))
    parts = ("vision_model.", "visual_projection.")
    weights = {k: v for k, v in net.state_dict().items() if k.startswith(parts)}
    clip = config.model_type == "clip"
    vision = image_half(name, weights, config.vision_config, clip)
    return vision, text_half(net, tokenizer, LONGEST)


def _no_model(spec: str) -> UsageError:
    return UsageError(
        f"{spec} has an image tower, but no text tower that leads into the same space; allowed "
        "as a model: a whole CLIP or SigLIP"
    )
