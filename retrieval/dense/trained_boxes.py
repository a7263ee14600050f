"""Detection of anything that has a name, by heads that were trained on boxes (OWL-ViT)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch import device as Device

from contrastive.dense.box_heads import BoxHeads, Detections
from contrastive.dense.decoder_folder import TrainedDecoder, load_decoder
from contrastive.dense.decoder_losses import corners
from contrastive.model.lit import LitModel
from contrastive.vision.patch_features import patch_features
from data.class_names import DEFAULT_TEMPLATES
from data.errors import UsageError
from data.given import Images, OneImage
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.examples import are_pictures
from retrieval.dense.segment import opened_images, shape_of, whole_pixels, windows_of
from retrieval.evaluation.classify import ZeroShotClassifier

MOST_BOXES = 300  # of a picture
SAME = 0.5  # IoU from which the worse of two boxes of one query is left out


class TrainedDetector:
    """Finds things by words, or by a picture of each, at any patch size: also what the heads were
    never trained to find.

    model: the one whose texts the heads read. queries: texts as the class names of
    `ZeroShotClassifier`, or pictures as `ZeroShotDetector` takes them, each of one thing that fills
    it; None: what the heads were trained to find. threshold: the least probability of a box.
    class_embeds: of these queries, where they were computed before.
    Raises `UsageError` as `ZeroShotDetector`, and for another model.
    """

    def __init__(
        self,
        trained: TrainedDecoder,
        model: LitModel,
        queries: Sequence[str | OneImage] | None = None,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        threshold: float = 0.1,
        class_embeds: Float[np.ndarray, "k d"] | None = None,
    ) -> None:
        if not isinstance(trained.decoder, BoxHeads):
            raise UsageError(f"a decoder of kind {trained.cfg.kind} finds no boxes by words")
        if trained.texts != model.text_fingerprint:
            raise UsageError(
                f"the heads were trained with the texts of {trained.tower_spec} as it was then; "
                "this model has others"
            )
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold {threshold}: a probability, 0 to 1")
        self.trained, self.model, self.threshold = trained, model, threshold
        self.heads: BoxHeads = trained.decoder
        self.class_names = list(trained.class_names)
        self._embeds: Tensor | None = None
        if queries is not None:
            self.class_names, self._embeds = self._embedded(queries, templates, class_embeds)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        queries: Sequence[str | OneImage] | None = None,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        threshold: float = 0.1,
        device: str | Device = "cpu",
        model: LitModel | None = None,
    ) -> "TrainedDetector":
        """The `model/` of a run of `launch/dense.py boxes`.

        model: one that is loaded already; None loads the one that the folder names. Raises
        `UsageError` as `contrastive.dense.decoder_folder.load_decoder`.
        """
        trained = load_decoder(folder)
        if model is None:
            model = LitModel.from_pretrained(trained.tower_spec)
        trained.tower.to(device)
        trained = replace(trained, decoder=trained.decoder.to(device))
        return cls(trained, model.to(device), queries, templates, threshold=threshold)

    def asked(
        self, queries: Sequence[str | OneImage], templates: str | Sequence[str] = DEFAULT_TEMPLATES
    ) -> "TrainedDetector":
        """The same heads, asked for other things."""
        return TrainedDetector(
            self.trained, self.model, queries, templates, threshold=self.threshold
        )

    @property
    def patch_sizes(self) -> tuple[int, ...]:
        """Those that it was trained at, pixels; it works at the tower's others too."""
        return self.trained.patch_sizes

    def predict(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[list[ScoredBox]]:
        """The boxes of each picture, best first, in its own pixels; label k is the k-th query.

        images, shorter_side: as `ZeroShotSegmenter.similarities` takes them; of a thing that is
        larger than a window its parts are found. patch_size: None takes the finest that was
        trained. A score is a probability. Of two boxes of one query that overlap by half (IoU), of
        one window or of two, the better is given, and at most 300 of a picture.
        """
        return [self.boxes_in(image, patch_size, shorter_side) for image in opened_images(images)]

    @torch.no_grad()
    def boxes_in(
        self,
        picture: Image.Image | Tensor,
        patch_size: int | None,
        shorter_side: int | None = None,
    ) -> list[ScoredBox]:
        """`predict` of one picture."""
        tower = self.trained.tower
        size = min(self.patch_sizes) if patch_size is None else patch_size
        windows = windows_of(tower, picture, size, shorter_side)
        extent = torch.tensor(windows.size[::-1]).repeat(2)
        whole = torch.tensor(windows.pixels.shape[:0:-1]).repeat(2) / size
        found = []
        for places, pixels in windows.by_forward(size):
            features = patch_features(tower, pixels.to(self._device), size)
            seen = self.heads(features, self.class_embeds)
            for (row, column), logits, boxes in zip(places, *seen, strict=True):
                best = _best(logits, boxes, self.threshold)
                start = torch.tensor((column, row)).repeat(2)
                found.append(best._replace(edges=(best.edges.cpu() * extent + start) / whole))
        joined = (torch.cat([part.cpu() for part in parts]) for parts in zip(*found, strict=True))
        return _distinct(_Candidates(*joined), shape_of(picture))

    @property
    def class_embeds(self) -> Float[Tensor, "k d"]:
        """Of the queries, unit norm."""
        if self._embeds is None:
            _, self._embeds = self._embedded(self.class_names, DEFAULT_TEMPLATES, None)
        return self._embeds

    def _embedded(
        self,
        queries: Any,
        templates: str | Sequence[str],
        class_embeds: Float[np.ndarray, "k d"] | None,
    ) -> tuple[list[str], Float[Tensor, "k d"]]:
        """Names of the queries, and their vectors."""
        if isinstance(queries, str) or not are_pictures(queries):
            found = ZeroShotClassifier(self.model, queries, templates, class_embeds)
            return found.class_names, torch.from_numpy(found.class_embeds).to(self._device)
        embeds = torch.stack([self._example(picture) for picture in opened_images(queries)])
        return [f"picture {number}" for number in range(1, len(queries) + 1)], embeds

    @torch.no_grad()
    def _example(self, picture: Image.Image | Tensor) -> Float[Tensor, " d"]:
        """The vector of the patch whose box is most like the whole picture."""
        features = self._features(picture, None)
        vectors = self.heads.embed(features)[0]
        boxes = self.heads(features, vectors[:1]).boxes[0]
        low, high = corners(boxes.cpu()).clamp(0, 1).split(2, dim=-1)
        share = (high - low).prod(-1)  # of the picture: what lies inside is its IoU with the whole
        return vectors[share.argmax()]

    @property
    def _device(self) -> Device:
        return next(self.trained.tower.parameters()).device

    def _features(
        self, picture: Image.Image | Tensor, patch_size: int | None
    ) -> Float[Tensor, "1 r c f"]:
        tower = self.trained.tower
        size = min(self.patch_sizes) if patch_size is None else patch_size
        return patch_features(
            tower, whole_pixels(tower, picture, size)[None].to(self._device), size
        )


def scored_boxes(
    found: Detections, shapes: Sequence[tuple[int, int]], threshold: float
) -> list[list[ScoredBox]]:
    """Of each picture of `shape` = (height, width), best first, without what is found twice."""
    pictures = zip(found.logits, found.boxes, shapes, strict=True)
    return [_distinct(_best(logits, boxes, threshold), shape) for logits, boxes, shape in pictures]


class _Candidates(NamedTuple):
    edges: Float[Tensor, "n 4"]
    """Left, top, right and bottom, as shares of the picture."""
    queries: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]

    def best(self) -> "_Candidates":
        """As many as are looked at."""
        chosen = self.scores.topk(min(len(self.scores), 10 * MOST_BOXES)).indices
        return _Candidates(self.edges[chosen], self.queries[chosen], self.scores[chosen])


def _best(
    logits: Float[Tensor, "n k"], boxes: Float[Tensor, "n 4"], threshold: float
) -> _Candidates:
    scores = logits.sigmoid()
    patches, queries = torch.nonzero(scores >= threshold).T
    return _Candidates(corners(boxes)[patches], queries, scores[patches, queries]).best()


def _distinct(found: _Candidates, shape: tuple[int, int]) -> list[ScoredBox]:
    from torchvision.ops import batched_nms

    edges, queries, scores = found.best()
    edges = edges.clamp(0, 1) * torch.tensor(shape[::-1], device=edges.device).repeat(2)
    keep = batched_nms(edges, scores, queries, SAME)[:MOST_BOXES]
    edges[:, 2:] -= edges[:, :2]
    return [
        ScoredBox((left, top, width, height), label + 1, score)
        for (left, top, width, height), label, score in zip(
            edges[keep].tolist(), queries[keep].tolist(), scores[keep].tolist(), strict=True
        )
        if width > 0 and height > 0
    ]
