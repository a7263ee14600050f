"""Zero-shot detection: a box around each connected region that is most like a text or a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from contrastive.model.lit import LitModel
from data.class_names import DEFAULT_TEMPLATES
from data.given import Images, OneImage
from retrieval.dense.average_precision import ScoredBox
from retrieval.dense.connected import boxes_of
from retrieval.dense.examples import are_pictures, example_embeds, whole_embeds
from retrieval.dense.segment import ZeroShotSegmenter, opened_images, shape_of


class ZeroShotDetector:
    """Finds things by words, or by a picture of each, at any patch size.

    queries: texts as the class names of `ZeroShotSegmenter`, or pictures: PIL images, arrays,
    tensors of 8 bits, or a `Path`. The other arguments are that class's. background: the least
    similarity (a cosine) of a region's pixels; also of each box's score.
    Raises `UsageError` as `ZeroShotSegmenter`, for a picture that cannot be read, and for texts and
    pictures together.
    """

    def __init__(
        self,
        model: LitModel,
        queries: Sequence[str | OneImage],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        background: float,
        value_path: bool = False,
        windows: Sequence[int] = (),
        class_embeds: Float[np.ndarray, "c d"] | None = None,
    ) -> None:
        names: Any = queries
        if not isinstance(queries, str) and are_pictures(queries):
            names = [f"picture {number}" for number in range(1, len(queries) + 1)]
            if class_embeds is None:
                find = whole_embeds if windows else example_embeds
                class_embeds = find(model, queries)
        self.segmenter = ZeroShotSegmenter(
            model,
            names,
            templates,
            background=background,
            value_path=value_path,
            windows=windows,
            class_embeds=class_embeds,
        )

    def predict(
        self, images: Images, patch_size: int | None = None, *, shorter_side: int | None = None
    ) -> list[list[ScoredBox]]:
        """The boxes of each picture, best first, in its own pixels; label k is the k-th query.

        images, patch_size, shorter_side: as `ZeroShotSegmenter.similarities` takes them. A score is
        the mean cosine of the region's pixels. Two things of one query that touch by a side of a
        pixel, not by a corner alone, are one region, so one box.
        """
        found = []
        for image in opened_images(images):
            maps = self.segmenter.similarities(image, patch_size, shorter_side=shorter_side)[0]
            found.append(self.boxes(maps, shape_of(image)))
        return found

    def boxes(
        self, similarities: Float[np.ndarray, "r c k"], shape: tuple[int, int]
    ) -> list[ScoredBox]:
        """What `predict` makes of a map for a picture of `shape` = (height, width)."""
        return boxes_of(*self.segmenter.judged(similarities, shape))
