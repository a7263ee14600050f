"""What a decoder is to find in a picture, as arrays: masks, or boxes."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from data.dense.picture import IGNORED, AnnotatedPicture
from data.problems import BadSample

UNUSABLE = -1  # as a box's label: nothing of the picture counts


@runtime_checkable
class Targets(Protocol):
    """Turns what a data set says of a picture into what a loss takes."""

    what: str
    """For messages: what pictures must have."""

    def of(self, picture: AnnotatedPicture, side: int) -> np.ndarray:
        """Of the picture, read as a square of so many pixels. Raises `BadSample` where it has
        none."""

    def of_unusable(self, side: int) -> np.ndarray:
        """Of a picture that does not count."""

    def stack(self, several: Sequence[np.ndarray]) -> np.ndarray:
        """Of a batch, pictures first."""


class MaskTargets:
    """A mask of the picture's classes, (s, s); `IGNORED` is not counted."""

    what = "masks"

    def of(self, picture: AnnotatedPicture, side: int) -> UInt8[np.ndarray, "s s"]:
        if picture.mask is None:
            raise BadSample("no_mask")
        mask = Image.fromarray(picture.mask).resize((side, side), Image.Resampling.NEAREST)
        return np.asarray(mask)

    def of_unusable(self, side: int) -> UInt8[np.ndarray, "s s"]:
        return np.full((side, side), IGNORED, np.uint8)

    def stack(self, several: Sequence[np.ndarray]) -> UInt8[np.ndarray, "b s s"]:
        return np.stack(several)


class BoxTargets:
    """Boxes (m, 6): label, whether it is a crowd (0 or 1), middle (x, y), width and height, these
    as shares of the picture. Label 0 fills up a batch."""

    what = "boxes"

    def of(self, picture: AnnotatedPicture, side: int) -> Float32[np.ndarray, "m 6"]:
        """A box is cut at the picture's edges; one that lies outside is left out."""
        if picture.boxes is None:
            raise BadSample("no_boxes")
        size: Any = picture.image.size
        found = []
        for true in picture.boxes:
            low = np.clip(np.array(true.box[:2]) / size, 0, 1)
            high = np.clip((np.array(true.box[:2]) + true.box[2:]) / size, 0, 1)
            if (high > low).all():
                found.append([true.label, true.crowd, *(low + high) / 2, *(high - low)])
        return np.array(found, np.float32).reshape(-1, 6)

    def of_unusable(self, side: int) -> Float32[np.ndarray, "1 6"]:
        return np.array([[UNUSABLE, 0, 0, 0, 0, 0]], np.float32)

    def stack(self, several: Sequence[np.ndarray]) -> Float[np.ndarray, "b m 6"]:
        most = max(1, *map(len, several))
        return np.stack([np.pad(one, ((0, most - len(one)), (0, 0))) for one in several])
