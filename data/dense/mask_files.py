"""Pictures with a mask of 8 bits each, in files of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.config import MAX_PIXELS
from data.dense.picture import IGNORED, AnnotatedPicture
from data.errors import UsageError
from data.images import decode_image, open_image
from data.problems import BadSample


@dataclass(frozen=True)
class MaskFiles:
    """Images and their masks. values: of masks -> labels; other values are outside the list."""

    images: Sequence[Path]
    masks: Sequence[Path]
    values: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.images)

    def key(self, row: int) -> str:
        return str(self.images[row])

    def load(self, row: int) -> AnnotatedPicture:
        mask_file = self.masks[row]
        if not mask_file.exists():
            raise BadSample("no_mask", f"no {mask_file}")
        image = read_picture(self.images[row])
        given = read_mask(mask_file, ("L", "P"), image)
        labels = np.zeros(256, np.uint8)
        known = np.zeros(256, bool)
        for value, label in self.values.items():
            labels[value], known[value] = label, True
        if not known[given].all():
            wrong = int(given[~known[given]][0])
            raise BadSample("mask_labels", f"{mask_file} has {wrong}, which is no class")
        return AnnotatedPicture(self.key(row), image, labels[given])


def class_values(num_classes: int, zero: int) -> dict[int, int]:
    """Of masks in which k is the k-th class and 255 is not counted. zero: what 0 is."""
    return {0: zero, IGNORED: IGNORED} | {k: k for k in range(1, num_classes + 1)}


def read_picture(file: Path) -> Image.Image:
    """As `data.images.decode_image`. Raises `BadSample`, of kind `unreadable`."""
    try:
        return decode_image(file.read_bytes(), MAX_PIXELS)
    except (BadSample, OSError) as error:
        raise BadSample("unreadable", f"{file}: {error}") from None


def read_mask(file: Path, modes: Sequence[str], image: Image.Image) -> UInt8[np.ndarray, "..."]:
    """The values of a PNG of one of these modes, for a picture: (h, w), of RGB (h, w, 3).

    Raises `BadSample`: `unreadable`, `mask_size`.
    """
    try:
        with open_image(file.read_bytes(), MAX_PIXELS) as opened:
            if opened.format != "PNG" or opened.mode not in modes:
                raise ValueError(f"a {opened.format} of mode {opened.mode} is no such mask")
            values = np.array(opened)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything in Pillow's plugins
        raise BadSample("unreadable", f"{file}: {error}") from None
    if values.shape[:2] != (image.height, image.width):
        sizes = f"{values.shape[1]} x {values.shape[0]}", f"{image.width} x {image.height}"
        raise BadSample("mask_size", f"{file} is of {sizes[0]} pixels, its picture of {sizes[1]}")
    return values


def read_text(file: Path, what: str) -> str:
    """Raises `UsageError`."""
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}; expected {what} there") from None
