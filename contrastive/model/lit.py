"""The model: a locked flexible image tower, and a text encoder that learns to read it.

LiT: Zero-Shot Transfer with Locked-image text Tuning (Zhai et al., arXiv:2111.07991).
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.files.hub import local_folder
from contrastive.files.weights import (
    files_checked,
    hash_weights,
    load_weights,
    read_config,
    read_weights,
    write_config,
    write_weights,
)
from contrastive.model.card import Card, ModelFacts, model_card
from contrastive.model.head import ImageHead, TextSideAndHead
from contrastive.model.mixed import encode_mixed, is_one
from contrastive.model.saved import build_parts, describe_parts
from contrastive.model.shaped import (
    ShapedPixels,
    pixels_of_one_shape,
    shaped_features,
    shaped_pixels,
)
from contrastive.model.text_side import TextSide
from contrastive.model.without_init import WithoutInit
from contrastive.text.padding import PaddedTokens, TokenBatch, padding_mask
from contrastive.text.tokenizers import cut_texts
from contrastive.vision.config import Head, is_library_spec
from contrastive.vision.earlier import keep_transform
from contrastive.vision.patch_features import patch_features
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.files import replaced_folder
from data.given import Images, check_text, in_parts, is_pixel_batch, list_images
from data.token_ids import TokenIds
from data.transform import ImageTransform

MAX_FORWARD = 256  # images or texts of one forward
MAX_DECODED = 64  # of one forward, where the images are files or pictures


class LitModel(nn.Module, ModelHubMixin):
    """`encode_image` and `encode_text` into one space, the images at any patch size.

    The affine (feature_mean, feature_whiten) whitens the tower's features, and may reduce their
    width: one for all patch sizes, fitted on training features. A self-supervised tower spends most
    of its variance on a few directions, such as drawing style, which would dominate every cosine.
    What is whitened may go through a trained head.

    `push_to_hub("user/name")` is huggingface_hub's, and uploads what `save_pretrained` writes.
    """

    feature_mean: Tensor
    feature_whiten: Tensor

    def __init__(
        self, vision: VisionTower, text: TextSide, embed_dim: int = 0, head: Head = "none"
    ) -> None:
        """embed_dim: width of the embeddings; 0: of the tower's features."""
        super().__init__()
        self.vision = vision
        self.text = text
        self.card = Card()
        self.register_buffer("feature_mean", torch.zeros(vision.embed_dim))
        width = embed_dim or vision.embed_dim
        self.register_buffer("feature_whiten", torch.eye(vision.embed_dim, width))
        self.head = None if head == "none" else ImageHead(head, width)

    @property
    def trained(self) -> nn.Module:
        """What trains, as one module: the text side, and the image head where there is one."""
        return self.text if self.head is None else TextSideAndHead(self.text, self.head)

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
        return self.feature_whiten.shape[1]

    @property
    def transform(self) -> ImageTransform:
        return self.vision.transform

    def embed_features(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings from the tower's raw features."""
        whitened = self.whiten(features)
        return F.normalize(whitened, dim=-1) if self.head is None else self.head(whitened)

    def image_affine(self) -> tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]:
        """Weight and bias of what `embed_features` norms; of an MLP head, where it started."""
        weight = self.feature_whiten.T
        if self.head is not None and self.head.kind == "linear":
            weight = weight + self.head.out.weight.detach() @ weight
        return weight, -weight @ self.feature_mean

    def whiten(self, features: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """The affine: what the head reads, or of unit norm is the embedding."""
        return (features.to(self.feature_mean.dtype) - self.feature_mean) @ self.feature_whiten

    def encode(
        self,
        inputs: Images,
        patch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        batch_size: int = MAX_DECODED,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> Float[np.ndarray, "*n d"] | Float[Tensor, "*n d"]:
        """Unit-norm vectors of texts and images, mixed as you like: float32, one row each, in the
        order given; of one text or image that is in no list, one vector.

        inputs: texts, and images as `encode_image` takes them; a text that is the path of an image
        file is that image. patch_size, max_tokens: of the images, as `encode_image` takes them.
        batch_size: inputs of one forward, up to 64.
        show_progress_bar: None shows one on a terminal after five seconds. convert_to_tensor:
        tensors of torch on the model's device in place of numpy's arrays.
        Raises `UsageError` for what is neither, and for a file that is missing or unreadable.
        """
        if not 1 <= batch_size <= MAX_DECODED:
            raise UsageError(f"batch_size {batch_size}: allowed are 1 to {MAX_DECODED}")
        encode_image = partial(self.encode_image, patch_size=patch_size, max_tokens=max_tokens)
        rows = encode_mixed(
            inputs, self.embed_dim, self.encode_text, encode_image, batch_size, show_progress_bar
        )
        rows = rows[0] if is_one(inputs) else rows
        return rows.to(self.device) if convert_to_tensor else rows.numpy()

    @torch.no_grad()
    def encode_image(
        self,
        images: Images,
        patch_size: int | None = None,
        max_tokens: int | None = None,
    ) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings, float32; of one image too, one row.

        images: a float tensor (b, 3, h, w) of pixels already normalised; or paths, PIL images,
        uint8 arrays (h, w, 3) or uint8 tensors (3, h, w), of any size, one or many. These are
        turned upright by their EXIF tag, transparency over white, resized, cropped (as the
        transform's `fit` says) and normalised. Images of several shapes share a
        forward too. Long lists take several forwards, and show their progress on a terminal.
        patch_size: pixels; the finest of `patch_sizes` when neither it nor `max_tokens` is given.
        max_tokens: a budget of patches per image; the grid is chosen for each
        (`contrastive.vision.grids.choose_grid`), and the patch size too where it is not given.
        Where `fit` is aspect, it is by default as many as a square of `image_size` has.
        Raises `UsageError` when the patch size does not divide the image's sides, for a budget
        below one token, for a file that cannot be read, and for what is no image.
        """
        if is_pixel_batch(images) and max_tokens is None:
            parts = (part.to(self.device) for part in images.split(MAX_FORWARD))
            rows = [self.embed_features(self.vision(part, patch_size)) for part in parts]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        given = list_images(images)
        rows = []
        for part in in_parts(given, MAX_DECODED, "encoding images"):
            pixels = [shaped_pixels(self.vision, i, patch_size, max_tokens) for i in part]
            rows.append(self.embed_shaped(pixels))
        return torch.cat(rows) if rows else torch.empty(0, self.embed_dim, device=self.device)

    @torch.no_grad()
    def embed_shaped(self, images: Sequence[ShapedPixels]) -> Float[Tensor, "b d"]:
        """Unit-norm image embeddings of images of any shapes, at patch sizes of their own."""
        return self.embed_features(shaped_features(self.vision, images))

    @torch.no_grad()
    def encode_patches(
        self, images: Images, patch_size: int | None = None, value_path: bool = False
    ) -> Float[Tensor, "b r c d"]:
        """Unit-norm embeddings of each patch, in rows and columns, float32.

        A product with `encode_text` says where in an image a text is. images, patch_size: as
        `encode_image` takes them, of one shape. value_path: as
        `contrastive.vision.patch_features.patch_features` takes it.
        Raises `UsageError` as `encode_image`, for no images, for those of several shapes, and for a
        tower that has no tokens of patches.
        """
        maps = []
        for part in pixels_of_one_shape(self.vision, images, patch_size).split(MAX_DECODED):
            features = patch_features(self.vision, part.to(self.device), patch_size, value_path)
            embeds = self.embed_features(features.flatten(0, 2))
            maps.append(embeds.unflatten(0, features.shape[:3]))
        return torch.cat(maps)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str] | Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Unit-norm text embeddings, float32; of one text too, one row.

        texts: strings, cut at the tower's context length, or token ids as its tokenizer pads them.
        Long lists take several forwards, and show their progress on a terminal.
        Raises `UsageError` for what is no text, or no valid Unicode.
        """
        tower = self.text.encoder.tower
        if isinstance(texts, Tensor):
            mask = padding_mask(texts, tower.tokenizer)
            return self._embed_tokens(TokenBatch((PaddedTokens(texts, mask),), len(texts)))
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            check_text(text)
        rows = []
        for part in in_parts(texts, MAX_FORWARD, "encoding texts"):
            ids = TokenIds.of(tower.tokenizer(part))
            rows.append(self._embed_tokens(TokenBatch.of(tower, ids)))
        return torch.cat(rows) if rows else torch.empty(0, self.embed_dim, device=self.device)

    def _embed_tokens(self, tokens: TokenBatch) -> Float[Tensor, "b d"]:
        training = self.text.training
        self.text.eval()
        embeds, *_ = self.text(tokens.to(self.device))
        self.text.train(training)
        return embeds

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.patch_sizes))
        return (
            f"LitModel({self.vision.config.name} at {self.image_size} px, patch sizes {sizes}; "
            f"{type(self.text.encoder.tower.net).__name__}; width {self.embed_dim})"
        )

    def cut_texts(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is longer than the text tower's context, so that `encode_text` does
        not read its end."""
        return cut_texts(self.text.encoder.tower.tokenizer, texts)

    # ---- identity --------------------------------------------------------------------------

    @property
    def image_fingerprint(self) -> str:
        """Equal for models whose image embeddings are equal: tower, affine, head, transform,
        dtype."""
        digest = hashlib.blake2b(self.vision.fingerprint.encode(), digest_size=16)
        digest.update(self.feature_mean.cpu().numpy().tobytes())
        digest.update(self.feature_whiten.cpu().numpy().tobytes())
        if self.head is not None:
            hash_weights(digest, self.head.state_dict())
        return digest.hexdigest()

    def keep_transform(self, image_fingerprint: str, made: str | Path) -> bool:
        """`contrastive.vision.earlier.keep_transform`, by `image_fingerprint`."""
        return keep_transform(self.vision, image_fingerprint, made, lambda: self.image_fingerprint)

    @property
    def text_fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.text.encoder.tower.config(), sort_keys=True).encode())
        hash_weights(digest, self.text.state_dict())
        return digest.hexdigest()

    def facts(self) -> ModelFacts:
        """For the model card."""
        tower = self.text.encoder.tower
        compiled = "torch._dynamo" in sys.modules  # compiled blocks are not counted
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            costs = {
                s: (self.vision.num_tokens(s), self.vision.gflops(s)) for s in self.patch_sizes
            }
        return ModelFacts(
            image_tower=self.vision.config.name,
            features=self.vision.config.features,
            fit=self.transform.fit,
            head="none" if self.head is None else self.head.kind,
            image_size=self.image_size,
            text_tower=type(tower.net).__name__,
            text_head="none" if self.text.encoder.head is None else self.text.encoder.head.kind,
            context_length=tower.tokenizer.context_length,
            loss=self.text.loss.kind,
            embed_dim=self.embed_dim,
            costs=costs,
        )

    # ---- files -----------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        card: Card | None = None,
        facts: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write config.json, model.safetensors, the tokenizer's files and a model card; no pickles.

        card: what is known of the training; as loaded when not given. facts: more entries of
        config.json. The folder is replaced whole: a reader never sees half of one. (What else the
        hub's mixin passes is its own card's and configuration.)
        """
        folder = Path(folder)
        self.card = card or self.card
        state = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        facts = {"card": self.card.as_json(), **(facts or {})}
        config = describe_parts(self.vision, self.text, self.embed_dim, self.head, facts)
        with replaced_folder(folder) as part:
            write_weights(part / "model.safetensors", state)
            (part / "README.md").write_text(model_card(self.facts(), self.card), encoding="utf-8")
            self.text.encoder.tower.save_tokenizer(part)
            write_config(part, config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, device: str | torch.device = "cpu", **hub: Any
    ) -> "LitModel":
        """Read what `save_pretrained` wrote; the image tower is locked, the model in eval mode.

        folder: or a hub name, `user/name`, for which `hub` may give `revision`, `token`, and what
        else `huggingface_hub.snapshot_download` takes; or a CLIP or SigLIP of open_clip or
        transformers, named as `contrastive.model.pretrained.load_pretrained` reads it. Raises
        `UsageError` for anything else.
        """
        if is_library_spec(str(folder)):
            from contrastive.model.pretrained import load_pretrained

            vision, encoder, loss = load_pretrained(str(folder))
            return cls(vision, TextSide(encoder, loss)).to(device).eval()
        folder = local_folder(folder, hub)
        config = read_config(folder, "text")
        try:
            with files_checked(folder, config), WithoutInit():
                model = cls(*build_parts(folder, config))
            model.card = Card.from_json(config.get("card", {}))
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise UsageError(f"{folder} is not a whole model folder: {error}") from error
        load_weights(model, read_weights(folder / "model.safetensors"), folder)
        return model.to(device).eval()
