"""A model at one patch size for transformers: a `VisionTextDualEncoderModel` and its processor.

The image tower stays a timm model, which transformers wraps; its features' mean goes into its last
bias, whitening and a linear head become the visual projection. transformers takes a text tower's
pooler, which for the BERT family is tanh of a linear map of the first token:

- Near zero tanh is the identity, so a small enough map passes the first token through.
- A mean over tokens is one more layer: no queries and keys, so that attention is uniform, and an
  output so large that the layer's residual is negligible. That layer's norm removes the
  mean over dimensions and the length. The length does not matter; the mean is where a reflection
  has put the direction that the text projection reads least. A projection to fewer dimensions
  does not read it at all; a trained square one next to nothing; else the check after writing tells.
"""

from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    TimmWrapperConfig,
    TimmWrapperModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from contrastive.export.open_clip import known_architecture
from contrastive.export.projection import affine, image_projection, text_projection
from contrastive.export.timm import timm_args, timm_net
from contrastive.files.transformers import no_progress_bars
from contrastive.model.lit import LitModel
from contrastive.text.open_clip import OpenClipTextTower, check_tokenizer
from contrastive.text.transformers import HFTextTower
from data.errors import UsageError

BERTS = ("bert", "camembert", "roberta", "xlm-roberta")
SMALL = 1e-3  # times entries of a norm's output, below 10: tanh differs by less than 1e-4 of it
LARGE = 1e4  # times the mean token: the residual turns it by 1e-4, and a cosine by 1e-8

USAGE = """```python
net = VisionTextDualEncoderModel.from_pretrained("THIS_FOLDER")
processor = VisionTextDualEncoderProcessor.from_pretrained("THIS_FOLDER")
```

The sigmoid loss's bias has no place in this class; it changes no ranking. timm must be installed.
Where an odd number of pixels is cropped, transformers' square lies one pixel before ours. A text
tower that is pooled by the mean of its tokens ends in one more layer that does it."""


@no_progress_bars()
def write_transformers(model: LitModel, patch_size: int, folder: Path, home: Path) -> None:
    """Write a folder that `VisionTextDualEncoderModel.from_pretrained` loads, with processor."""
    tower = model.text.encoder.tower
    projection = text_projection(model, "transformers").detach()
    check_tokenizer(tower, "transformers")
    if isinstance(tower, OpenClipTextTower):
        text, projection = _clip_text(tower, projection)
        tokenizer = _clip_tokenizer(tower)
    else:
        assert isinstance(tower, HFTextTower)
        text = _bert(tower, projection)
        tokenizer = tower.tokenizer.hf
    vision = _vision(model, patch_size)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=model.embed_dim
    )
    net = VisionTextDualEncoderModel(config, vision, text)
    net.visual_projection.weight.copy_(image_projection(model, "transformers")[1].T)
    net.text_projection.weight.copy_(projection)
    net.logit_scale.copy_(model.text.scale().log())
    net.save_pretrained(folder)
    size = model.image_size
    square = {"height": size, "width": size}
    crops = model.transform.fit == "crop"
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size} if crops else square,
        do_center_crop=crops,
        crop_size=square,
        image_mean=model.vision.mean,
        image_std=model.vision.std,
    )
    length, tokenizer.model_max_length = (
        tokenizer.model_max_length,
        tower.tokenizer.context_length,
    )
    VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(folder)
    tokenizer.model_max_length = length


@no_progress_bars()
def read_transformers(model: LitModel, folder: Path) -> tuple[Any, Any]:
    """(encode_image, encode_text) of the folder, as transformers loads it."""
    net: Any = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    tokenizer = VisionTextDualEncoderProcessor.from_pretrained(folder).tokenizer

    def encode_text(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return net.get_text_features(**tokens).pooler_output

    return lambda images: net.get_image_features(images).pooler_output, encode_text


# ---- image tower ---------------------------------------------------------------------------


def _vision(model: LitModel, patch_size: int) -> TimmWrapperModel:
    tower = model.vision
    net = timm_net(tower, patch_size, projected=True)
    mean, _ = affine(model)
    args = {k: v for k, v in timm_args(tower, patch_size).items() if k != "num_classes"}
    more: Any = {"hidden_size": len(mean), "num_labels": 0}
    config = TimmWrapperConfig(architecture=tower.config.name, model_args=args, **more)
    wrapped = TimmWrapperModel(config)
    wanted = wrapped.timm_model.state_dict()
    wrapped.timm_model.load_state_dict({k: v for k, v in net.state_dict().items() if k in wanted})
    if mean.any():
        _last_bias(wrapped.timm_model, tower.config.name).sub_(mean)
    return wrapped


def _last_bias(net: Any, name: str) -> Tensor:
    """The bias that is added to the pooled features last."""
    modules = dict(net.named_modules())
    for last in ("fc_norm", "attn_pool.mlp.fc2", "head.norm", "norm"):
        bias = getattr(modules.get(last), "bias", None)
        if bias is not None:
            return bias
    raise UsageError(
        f"transformers cannot take the mean from the features of {name}, which ends without a "
        "bias; allowed: such a tower with a mean of zero (init_samples 0)"
    )


# ---- text tower ----------------------------------------------------------------------------


def _bert(tower: HFTextTower, projection: Float[Tensor, "d w"]) -> Any:
    kind = tower.net.config.model_type
    if kind not in BERTS or tower.pooling not in ("mean", "cls"):
        raise UsageError(
            f"transformers cannot pool a text tower of type {kind} by {tower.pooling!r} in a "
            f"VisionTextDualEncoderModel; allowed: {', '.join(BERTS)} by mean or cls, or "
            "open_clip's own"
        )
    config = type(tower.net.config).from_dict(tower.net.config.to_dict())
    config.num_hidden_layers += tower.pooling == "mean"
    net: Any = AutoModel.from_config(config)
    rest = net.load_state_dict(tower.net.state_dict(), strict=False).missing_keys
    assert all(
        k.startswith(("pooler.", f"encoder.layer.{config.num_hidden_layers - 1}.")) for k in rest
    )
    turn = torch.eye(tower.width)
    if tower.pooling == "mean":
        turn = reflection(projection)
        layer = net.encoder.layer[-1]
        for parameter in layer.parameters():
            parameter.zero_()
        layer.attention.self.value.weight.copy_(torch.eye(tower.width))
        layer.attention.output.dense.weight.copy_(LARGE * turn)
        layer.attention.output.LayerNorm.weight.fill_(1)
        layer.output.LayerNorm.weight.fill_(1)
    net.pooler.dense.weight.copy_(SMALL * turn)
    net.pooler.dense.bias.zero_()
    return net


def reflection(projection: Float[Tensor, "d w"]) -> Float[Tensor, "w w"]:
    """The Householder reflection that swaps the direction `projection` reads least with
    (1, ..., 1)/sqrt(w).

    Symmetric and orthogonal, so its own inverse.
    """
    width = projection.shape[1]
    least = torch.linalg.eigh(projection.double().T @ projection.double()).eigenvectors[:, 0]
    ones = torch.full_like(least, width**-0.5)
    normal = least - ones * (-1 if least @ ones > 0 else 1)
    normal /= normal.norm()
    return (torch.eye(width).double() - 2 * torch.outer(normal, normal)).float()


def _clip_text(
    tower: OpenClipTextTower, projection: Float[Tensor, "d w"]
) -> tuple[CLIPTextModel, Float[Tensor, "d v"]]:
    """CLIP's text model, and its own projection and ours multiplied into one."""
    net, block = tower.net, tower.net.transformer.resblocks[0]
    raw = net.state_dict()
    own = raw.pop("text_projection", torch.eye(net.width))
    config = CLIPTextConfig(
        vocab_size=net.vocab_size,
        hidden_size=net.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(net.transformer.resblocks),
        num_attention_heads=net.heads,
        max_position_embeddings=net.context_length,
        hidden_act="quick_gelu" if tower.model.get("quick_gelu") else "gelu",
        layer_norm_eps=net.ln_final.eps,
        eos_token_id=2,  # by which CLIP means the highest token id
    )
    out = {
        "embeddings.token_embedding.weight": raw.pop("token_embedding.weight"),
        "embeddings.position_embedding.weight": raw.pop("positional_embedding"),
    }
    names = {
        "ln_final": "final_layer_norm",
        "transformer.resblocks": "encoder.layers",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn": "self_attn",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, value in raw.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            out[name] = value
    clip = CLIPTextModel(config)
    try:
        clip.load_state_dict(out)
        return clip, projection @ own.T
    except (RuntimeError, AttributeError) as error:
        raise UsageError(
            f"transformers' CLIP text model cannot express {tower.architecture}; "
            "allowed: open_clip's plain text transformers, e.g. ViT-B-32"
        ) from error


def _clip_tokenizer(tower: OpenClipTextTower) -> CLIPTokenizer:
    own: Any = open_clip.get_tokenizer(known_architecture(tower))
    start, end = (own.decoder[i] for i in own.all_special_ids[:2])
    return CLIPTokenizer(
        own.encoder,
        sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__),
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
    )
