"""Segmentation by a decoder that was trained on the patches of a locked tower."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch import device as Device

from contrastive.dense.decoder_folder import TrainedDecoder, load_decoder
from contrastive.vision.patch_features import patch_features
from contrastive.vision.tower import VisionTower
from data.errors import UsageError
from data.given import Images
from retrieval.dense.matched_names import MatchedNames, match_names
from retrieval.dense.segment import map_by_windows, opened_images, shape_of
from retrieval.dense.upsample import upsampled


class TrainedSegmenter:
    """Says of each pixel which of the classes it is of that the decoder was trained for, at any
    patch size.

    class_names: of the labels in masks, where these are not to be the decoder's own. Classes are
    matched by name (`matched`); what is of a class that is not named is background. Raises
    `UsageError` where the decoder has none of them.
    """

    def __init__(self, trained: TrainedDecoder, class_names: Sequence[str] | None = None) -> None:
        if trained.cfg.kind == "boxes":
            raise UsageError("a decoder of kind boxes gives no masks; TrainedDetector reads it")
        self.trained = trained
        self.class_names = list(trained.class_names if class_names is None else class_names)
        self.matched: MatchedNames = match_names(trained.class_names, self.class_names)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | Device = "cpu",
        *,
        tower: VisionTower | None = None,
    ) -> "TrainedSegmenter":
        """The `model/` of a run of `launch/dense.py`.

        tower: one that is loaded already, which stays on its device; None loads the one that the
        folder names. Raises `UsageError` for another than the decoder was trained on, and for what
        is no decoder's folder.
        """
        trained = load_decoder(folder, tower)
        if tower is None:
            trained.tower.to(device)
        where = next(trained.tower.parameters()).device
        return cls(replace(trained, decoder=trained.decoder.to(where)))

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Those that it was trained at, pixels; it works at the tower's others too."""
        return self.trained.patch_sizes

    def __repr__(self) -> str:
        trained = self.trained
        names = ", ".join(self.class_names[:3]) + (", ..." if len(self.class_names) > 3 else "")
        sizes = ", ".join(map(str, self.patch_sizes))
        return (
            f"TrainedSegmenter({len(self.class_names):,} classes ({names}), {trained.cfg.kind} on "
            f"{trained.tower_spec} ({trained.features}), trained at patch sizes {sizes})"
        )

    def predict(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[UInt8[np.ndarray, "h w"]]:
        """A mask of each picture, at its own resolution: 0 is background, k the k-th class.

        images, shorter_side: as `ZeroShotSegmenter.predict` takes them. patch_size: None takes the
        finest that was trained.
        """
        return [
            self.labels_and_scores(image, patch_size, shorter_side)[0]
            for image in opened_images(images)
        ]

    def labels_and_scores(
        self,
        picture: Image.Image | Tensor,
        patch_size: int | None,
        shorter_side: int | None = None,
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """The mask that `predict` gives, and the probability of each pixel's class."""
        labels, most = self._own_labels(picture, patch_size, shorter_side)
        return self.matched.labels[labels], most

    def _own_labels(
        self, picture: Image.Image | Tensor, patch_size: int | None, shorter_side: int | None
    ) -> tuple[UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """`labels_and_scores`, by the decoder's own classes."""
        shape = shape_of(picture)
        labels, most = np.empty(shape, np.uint8), np.empty(shape, np.float32)
        for rows, values in upsampled(self._map(picture, patch_size, shorter_side), shape):
            scores, classes = values.softmax(0).max(0)
            labels[rows], most[rows] = classes, scores
        return labels, most

    def logits(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[Float[np.ndarray, "r c k"]]:
        """Of each patch and each of the decoder's own classes, background first: what `predict`
        resizes to the picture."""
        return [self._map(i, patch_size, shorter_side) for i in opened_images(images)]

    def _map(
        self, image: Image.Image | Tensor, patch_size: int | None, shorter_side: int | None
    ) -> Float[np.ndarray, "r c k"]:
        tower, decoder = self.trained.tower, self.trained.decoder
        device = next(tower.parameters()).device

        def logits(pixels: Tensor, size: int) -> Tensor:
            features = patch_features(tower, pixels.to(device), size)
            return decoder(features).float().permute(0, 2, 3, 1)

        size = min(self.trained.patch_sizes) if patch_size is None else patch_size
        return map_by_windows(tower, logits, image, size, shorter_side)
