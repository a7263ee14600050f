"""The model: a locked flexible image tower, and a text encoder that learns to read it.

LiT: Zero-Shot Transfer with Locked-image text Tuning (Zhai et al., arXiv:2111.07991).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrastive.loss import Reduce, partial_lse, sigmoid_loss, softmax_loss
from contrastive.text import TextEncoder, TokenGroups, Tokens, build_text_tower
from contrastive.vision import TowerConfig, VisionTower, build_vision_tower
from data.errors import UsageError
from data.images import ImageTransform


@dataclass(frozen=True)
class LossConfig:
    """Which loss, and what counts as a positive pair."""

    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    positives: Literal["pair", "caption"] = "pair"
    """pair: a text's own image. caption: all images of the batch with the same captions."""


class TextSide(nn.Module):
    """Everything that trains: the text encoder, the temperature and, for sigmoid, the bias."""

    def __init__(self, encoder: TextEncoder, loss: LossConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        # SigLIP starts at t = 10, b = -10; with b = -2.71 big_vision's small-batch recipe.
        # CLIP starts at t = 1/0.07. Shape (1,): ZeRO on gloo cannot hold a 0-dimensional parameter.
        scale = 10.0 if loss.kind == "sigmoid" else 1 / 0.07
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        if loss.kind == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([-2.71]))

    def scale(self) -> Float[Tensor, ""]:
        """The temperature's multiplier t, at most 100 (clamped here: ZeRO's master copy forgets
        a clamp of the parameter)."""
        return self.logit_scale[0].clamp(max=math.log(100)).exp()

    def forward(
        self,
        tokens: TokenGroups,
        image_embeds: Float[Tensor, "b d"] | None = None,
        targets: Float[Tensor, "b m"] | None = None,
        reduce_lse: Reduce = lambda partial: partial,
    ) -> Tensor:
        """The share of the global loss of these m texts, given all B images and the targets.

        Without targets, the softmax's partial logsumexps (b,); without images either, the text
        embeddings (m, d). One entry for all three: ZeRO-3 gathers parameters around it.
        """
        text_embeds = self.encoder(tokens)
        if image_embeds is None:
            return text_embeds
        with torch.autocast(text_embeds.device.type, enabled=False):
            if targets is None:
                return partial_lse(image_embeds, text_embeds, self.scale())
            if self.loss.kind == "sigmoid":
                return sigmoid_loss(
                    image_embeds, text_embeds, targets, self.scale(), self.logit_bias[0]
                )
            return softmax_loss(image_embeds, text_embeds, targets, self.scale(), reduce_lse)


class LitModel(nn.Module):
    """`encode_image` and `encode_text` into one space, the images at any patch size.

    The affine (feature_mean, feature_std) standardises the tower's features, one for all patch
    sizes; it starts as the identity and is fitted on training features.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, vision: VisionTower, text: TextSide) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.register_buffer("feature_mean", torch.zeros(vision.embed_dim))
        self.register_buffer("feature_std", torch.ones(vision.embed_dim))

    # ---- encode ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.feature_mean.device

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        return self.vision.patch_sizes

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def embed_dim(self) -> int:
        return self.vision.embed_dim

    @property
    def transform(self) -> ImageTransform:
        return self.vision.transform

    def embed_features(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings from the tower's raw features."""
        standard = (features.float() - self.feature_mean) / self.feature_std
        return F.normalize(standard, dim=-1)

    @torch.no_grad()
    def encode_image(
        self,
        images: Float[Tensor, "b 3 s s"] | Sequence[Image.Image],
        patch_size: int | None = None,
    ) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings, float32.

        images: a tensor of pixels already normalised, or PIL images of any size.
        patch_size: pixels; the finest of `patch_sizes` when not given.
        Raises `UsageError` when it does not divide the image side.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.transform(image) for image in images])
        return self.embed_features(self.vision(images.to(self.device), patch_size))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str] | Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Unit-norm text embeddings, float32.

        texts: strings, cut at the tower's context length, or token ids as its tokenizer pads them.
        """
        tower = self.text.encoder.tower
        if isinstance(texts, Tensor):
            tokens = TokenGroups((Tokens(texts, (texts != tower.pad_id).long()),), len(texts))
        else:
            tokens = TokenGroups.of(tower, list(texts))
        training = self.text.training
        self.text.eval()
        embeds = self.text(tokens.to(self.device))
        self.text.train(training)
        return embeds

    def fit_affine(self, features: Float[Tensor, "n d"]) -> None:
        """Standardise per dimension with the statistics of these (training) features."""
        self.feature_mean.copy_(features.float().mean(dim=0))
        self.feature_std.copy_(features.float().std(dim=0).clamp_min(1e-6))

    # ---- identity --------------------------------------------------------------------------

    @property
    def image_fingerprint(self) -> str:
        """Equal for models whose image embeddings are equal: tower, affine, transform, dtype."""
        digest = hashlib.blake2b(self.vision.fingerprint.encode(), digest_size=16)
        digest.update(self.feature_mean.cpu().numpy().tobytes())
        digest.update(self.feature_std.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def text_fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.text.encoder.tower.config(), sort_keys=True).encode())
        for name, tensor in sorted(self.text.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    # ---- files -----------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, text_state: dict[str, Tensor] | None = None
    ) -> None:
        """Write config.json, model.safetensors and the tokenizer's files; no pickles.

        text_state: the weights of `text` when they live elsewhere (gathered from ZeRO shards).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("text.")}
        text = self.text.state_dict() if text_state is None else text_state
        state |= {f"text.{k}": v for k, v in text.items()}
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in state.items()},
            folder / "model.safetensors",
        )
        config = {
            "format": 1,
            "vision": asdict(self.vision.config) | {"patch_sizes": self.patch_sizes},
            "vision_dtype": str(next(self.vision.parameters()).dtype).removeprefix("torch."),
            "text": self.text.encoder.tower.config(),
            "loss": asdict(self.text.loss),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.text.encoder.tower.save_tokenizer(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "LitModel":
        """Read what `save_pretrained` wrote; the image tower is locked, the model in eval mode."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is not a model folder: it has no config.json")
        config = json.loads((folder / "config.json").read_text())
        if config.get("format") != 1 or "text" not in config:
            raise UsageError(f"{folder}/config.json does not describe a model of format 1")
        vision = build_vision_tower(TowerConfig.from_json(config["vision"]))
        vision.to(getattr(torch, config["vision_dtype"]))
        encoder = TextEncoder(build_text_tower(config["text"], folder), vision.embed_dim)
        model = cls(vision.lock(), TextSide(encoder, LossConfig(**config["loss"])))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(device).eval()
