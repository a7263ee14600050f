"""Image files to tensors of 8-bit pixels: what `data.images` gives, most JPEGs in less time."""

from contextlib import suppress

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from data.image_headers import format_of, is_ordinary
from data.images import decode_image, open_image

try:
    import simplejpeg
except ImportError:  # no wheel for this machine; Pillow's pixels are the same
    simplejpeg = None


def decode_pixels(data: bytes, max_pixels: int) -> UInt8[Tensor, "3 h w"]:
    """The image that `data.images.decode_image` gives of a file. Raises as it does."""
    pixels = _decode_jpeg(data, max_pixels)
    return as_pixels(decode_image(data, max_pixels)) if pixels is None else pixels


def _decode_jpeg(data: bytes, max_pixels: int) -> UInt8[Tensor, "3 h w"] | None:
    """None for what Pillow is to decide: other formats, colours and orientations, and whatever is
    damaged. Raises `BadSample` where the header shows that the file cannot be used."""
    if simplejpeg is None or format_of(data) != "JPEG" or not is_ordinary(data, "JPEG"):
        return None
    image = open_image(data, max_pixels)
    if image.mode not in ("RGB", "L") or not _is_upright(image):
        return None
    with suppress(ValueError):  # of libjpeg's warnings too, after which pixels are guesses
        array = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        if array.shape == (image.height, image.width, 3):
            return torch.from_numpy(array).permute(2, 0, 1)
    return None


def _is_upright(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    except Exception:  # a damaged tag
        return False


def as_pixels(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """A copy of an RGB image's pixels."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def as_image(pixels: UInt8[Tensor, "3 h w"]) -> Image.Image:
    """An RGB image, a copy."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
