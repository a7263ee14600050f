"""Images and texts as callers of the library pass them: files, PIL images, arrays, tensors, one or
many."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.config import MAX_PIXELS
from data.errors import UsageError
from data.images import decode_image, upright_rgb
from data.problems import BadSample
from data.progress import Progress

OneImage: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
Images: TypeAlias = OneImage | Sequence[OneImage]

ALLOWED = (
    "paths, PIL images, uint8 arrays (h, w), (h, w, 3) or (h, w, 4), uint8 tensors (3, h, w), "
    "or float tensors (3, s, s) of normalised pixels"
)


def list_images(images: Any) -> list[Any]:
    """One entry per image of `Images`; no file is read yet. Four axes are several images.

    Raises `UsageError` for what is neither an image nor a sequence.
    """
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if not hasattr(images, "__iter__"):
        raise UsageError(f"{type(images).__name__} is no image; allowed: {ALLOWED}")
    return list(images)


def is_normalised(image: Any) -> bool:
    """Whether it is a tensor of pixels as a tower takes them."""
    return isinstance(image, Tensor) and image.is_floating_point() and image.shape[:-2] == (3,)


def is_pixel_batch(images: Any) -> TypeGuard[Float[Tensor, "b c h w"]]:
    """Whether it is one tensor of several images' pixels as a tower takes them."""
    return isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4


def as_rgb(image: Any) -> Image.Image:
    """A `OneImage` as `data.images.decode_image` gives its file.

    Raises `UsageError` for a file that cannot be read, and for what is no image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return decode_image(Path(image).read_bytes(), MAX_PIXELS)
        except (BadSample, OSError) as error:
            raise UsageError(f"{image} cannot be read as an image: {error}") from error
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    array = image
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[:-2] == (3,):
        array = image.permute(1, 2, 0).cpu().numpy()
    is_pixels = isinstance(array, np.ndarray) and array.dtype == np.uint8
    if is_pixels and (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
        return upright_rgb(Image.fromarray(array))
    shape = f" of {image.dtype}, {tuple(image.shape)}," if hasattr(image, "shape") else ""
    raise UsageError(f"{type(image).__name__}{shape} is no image; allowed: {ALLOWED}")


def check_text(text: Any) -> None:
    """Raises `UsageError` for what is no text, or not valid Unicode."""
    if not isinstance(text, str):
        raise UsageError(f"{type(text).__name__} is no text; allowed: texts")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text {text[:80]!a} is not valid Unicode ({error.reason})") from None


def in_parts(items: list[Any], size: int, what: str) -> Iterator[list[Any]]:
    """The list in parts; a progress bar shows on a terminal after five seconds."""
    if len(items) <= size:
        yield from [items] if items else []
        return
    starts = range(0, len(items), size)
    for start in Progress(starts, what, unit="batch", delay=5, leave=False):
        yield items[start : start + size]
