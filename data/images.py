"""Bytes to pixels: decoding that survives strangers' files, views, and the tower's transform."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from data.problems import BadSample

# Raster formats alone: others (EPS, ...) start programs or follow paths.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, upright by its EXIF tag, transparency over white, first frame of several.

    Raises `BadSample`: "not_an_image", "truncated_image", or "image_too_large" above `max_pixels`
    (told from the header, before any pixel is decoded; Pillow's own limit holds as well).
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
        return _to_rgb(_upright(image))
    except Exception as error:
        kind = "truncated_image" if "truncated" in str(error).lower() else "not_an_image"
        raise BadSample(kind, f"{type(error).__name__}: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged tag costs the rotation, not the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
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
class ImageTransform:
    """Shorter side to `image_size` (bicubic, antialiased), centre crop, normalise per channel."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 s s"]:
        """float32, (pixel / 255 - mean) / std, of an RGB image of any size."""
        # copied: Pillow's array is read-only
        pixels = torch.from_numpy(np.array(self.crop(image), dtype=np.uint8))
        channels = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return channels.div_(255).sub_(mean).div_(std)

    def crop(self, image: Image.Image) -> Image.Image:
        """The square that the tower sees, `image_size` pixels a side, RGB."""
        size = self.image_size
        image = image if image.mode == "RGB" else _to_rgb(image)
        width, height = image.size
        if max(width, height) > 16 * min(width, height):
            # resized whole, a strip of 1 x 60000 pixels would become 224 x 13 million
            image = _middle(image, 16 * min(width, height))
            width, height = image.size
        short = min(width, height)
        resized = (int(size * width / short), int(size * height / short))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
        return image.crop((left, top, left + size, top + size))

    def fingerprint(self) -> str:
        """Equal where the pixels that reach the tower are equal."""
        mean = ",".join(f"{value:.6g}" for value in self.mean)
        std = ",".join(f"{value:.6g}" for value in self.std)
        return f"shorter-side-{self.image_size}-bicubic-centre-crop/mean={mean}/std={std}"


@dataclass(frozen=True)
class Augment:
    """Augmented views of pictures: a random square, mirrored or not.

    A view is a pure function of (key, number), the same in every epoch and run, so that what a
    locked tower says of it can be kept. View 0 is the picture itself.
    """

    crop: float = 1.0  # smallest share of the area of the largest square, above 0
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


def _middle(image: Image.Image, longest: int) -> Image.Image:
    width, height = image.size
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
