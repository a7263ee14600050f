"""Image files to RGB: decoding untrusted files, and augmented views. Needs no torch."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data.problems import BadSample

# Raster formats only: other plugins of Pillow start programs (EPS) or open further files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, upright by its EXIF tag, transparency over white, first frame of several.

    Raises `BadSample`: "not_an_image", "truncated_image", or "image_too_large" above `max_pixels`
    (checked in the header, before any pixel is decoded; Pillow's own limit holds as well).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image_too_large", str(error)) from None
    except Exception as error:  # a broken header can raise nearly anything in Pillow's plugins
        raise BadSample("not_an_image", f"{type(error).__name__}, {len(data)} bytes") from None
    width, height = image.size
    if width * height > max_pixels:
        cause = f"{width} x {height} pixels, the limit is {max_pixels}"
        raise BadSample("image_too_large", cause)
    try:
        image.load()
        return to_rgb(_upright(image))
    except Exception as error:
        kind = "truncated_image" if "truncated" in str(error).lower() else "not_an_image"
        raise BadSample(kind, f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # with a damaged tag, keep the image as it is
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, transparency over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        # 32-bit and float files do not say their range: 0..1, 0..255 or 0..65535 are in use
        top = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), values.max())
        if image.mode == "I" and top == 1.0:
            top = 255.0
        grey = (values.clip(0) * (255.0 / top)).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Augment:
    """Augmented views of an image: a random square, mirrored or not.

    A view is a pure function of (key, view number), the same in every epoch and run, so that its
    features can be cached. View 0 is the image itself.
    """

    crop: float = 1.0  # least share of the largest square's area, above 0
    flip: bool = False  # mirror half of the views

    def __call__(self, image: Image.Image, key: str, view: int) -> Image.Image:
        if not view:
            return image
        digest = hashlib.blake2b(f"{view}/{key}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        share, across, down, mirror = rng.random(4)
        side = min(image.size) * (self.crop + (1 - self.crop) * share) ** 0.5
        side = max(1, round(side))
        left = round(across * (image.width - side))
        top = round(down * (image.height - side))
        image = image.crop((left, top, left + side, top + side))
        if self.flip and mirror < 0.5:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def fingerprint(self) -> str:
        """Equal where the views are equal."""
        return f"square-crop-{self.crop:g}" + ("/mirrored" if self.flip else "")
