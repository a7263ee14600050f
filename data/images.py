"""Image files to RGB: decoding untrusted files, and augmented views. Needs no torch."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageOps

from data.image_headers import format_of, is_ordinary, what_it_is
from data.problems import BadSample

AnyImage = TypeVar("AnyImage")

# Only these: other plugins of Pillow start programs (EPS) or open further files.
_OPENED_AS = {"JPEG": ("JPEG", "MPO"), "HEIF": ("HEIF", "AVIF")}


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, upright by its EXIF tag, transparency over white, first frame of several.

    Raises `BadSample`: "not_an_image", "heic" for one that needs the extra of that name,
    "truncated_image", "image_too_large" above `max_pixels` (checked in the header, before any pixel
    is decoded; Pillow's own limit holds as well), or "image_too_costly" for one that takes far more
    than its pixels suggest. What the header cannot bound is decoded in another process, see
    `data.decode_apart`.
    """
    kind = format_of(data)
    if kind is not None and is_ordinary(data, kind):
        with suppress(_MuchText):
            return load_rgb(open_image(data, max_pixels))
    elif kind is None:
        raise BadSample("not_an_image", what_it_is(data))
    from data.decode_apart import decode_apart

    return decode_apart(data, max_pixels)


class _MuchText(Exception):  # noqa: N818
    """A PNG's texts or colour profile exceed what Pillow unpacks."""

    @classmethod
    def check(cls, error: Exception) -> None:
        if "MAX_TEXT" in str(error):
            raise cls from None


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read, no pixel decoded. Raises as `decode_image`."""
    kind = format_of(data)
    if kind is None:
        raise BadSample("not_an_image", what_it_is(data))
    try:
        image = Image.open(io.BytesIO(data), formats=_OPENED_AS.get(kind, (kind,)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image_too_large", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a broken header can raise nearly anything in Pillow's plugins
        _MuchText.check(error)
        if kind == "HEIF" and isinstance(error, KeyError):
            raise BadSample(
                "heic", "a HEIF, which pip install pillow-heif makes readable"
            ) from None
        unread = "is not read here" if isinstance(error, KeyError) else "has a damaged header"
        raise BadSample("not_an_image", f"a {kind} that {unread}, {len(data)} bytes") from None
    width, height = image.size
    if width * height > max_pixels:
        cause = f"{width} x {height} pixels, the limit is {max_pixels}"
        raise BadSample("image_too_large", cause)
    return image


def load_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, upright and RGB. Raises as `decode_image`."""
    try:
        return upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        _MuchText.check(error)
        if str(error).endswith("decoder error -9"):  # of Pillow's C code
            raise MemoryError from None
        kind = "truncated_image" if "truncated" in str(error).lower() else "not_an_image"
        raise BadSample(kind, f"{type(error).__name__}: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as `decode_image` gives its file. Changes nothing of the image."""
    image.load()  # an orientation may stand behind the pixels
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception:  # with a damaged tag, keep the image as it is
        pass
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode, transparency over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return _grey(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey of an image of 32-bit integers or floats, in bands, as float64 takes much room."""
    largest = max(float(band.max()) for _, band in _bands(image))
    # such files do not say their range: 0..1, 0..255 or 0..65535 are in use
    top = next((top for top in (1.0, 255.0, 65535.0) if largest <= top), largest)
    if image.mode == "I" and top == 1.0:
        top = 255.0
    grey = Image.new("L", image.size)
    for row, band in _bands(image):
        values = (band.clip(0) * (255.0 / top)).round().astype(np.uint8)
        grey.paste(Image.fromarray(values), (0, row))
    return grey


def _bands(image: Image.Image) -> Iterator[tuple[int, Float[np.ndarray, "h w"]]]:
    """(first row, rows) of about a million pixels each."""
    rows = max(1, (1 << 20) // image.width)
    for row in range(0, image.height, rows):
        band = image.crop((0, row, image.width, min(row + rows, image.height)))
        yield row, np.nan_to_num(np.asarray(band, dtype=np.float64))


@dataclass(frozen=True)
class Augment:
    """Augmented views of an image: a random square, mirrored or not.

    A view is a pure function of (key, view number), the same in every epoch and run, so that its
    features can be cached. View 0 is the image itself.
    """

    crop: float = 1.0  # least share of the largest square's area, above 0
    flip: bool = False  # mirror half of the views

    def __call__(self, image: AnyImage, key: str, view: int) -> AnyImage:
        """The view of a PIL image, or of a tensor (3, h, w): the same pixels."""
        if not view:
            return image
        given: Any = image
        is_tensor = not isinstance(image, Image.Image)
        width, height = given.shape[:0:-1] if is_tensor else given.size
        left, top, side, mirrored = self._square(width, height, key, view)
        if is_tensor:
            square = given[:, top : top + side, left : left + side]
            return square.flip(-1) if mirrored else square
        square = given.crop((left, top, left + side, top + side))
        return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square

    def _square(self, width: int, height: int, key: str, view: int) -> tuple[int, int, int, bool]:
        """Left, top, side, and whether it is mirrored."""
        digest = hashlib.blake2b(f"{view}/{key}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        share, across, down, mirror = rng.random(4)
        side = min(width, height) * (self.crop + (1 - self.crop) * share) ** 0.5
        side = max(1, round(side))
        left = round(across * (width - side))
        top = round(down * (height - side))
        return left, top, side, bool(self.flip and mirror < 0.5)

    def fingerprint(self) -> str:
        """Equal where the views are equal."""
        return f"square-crop-{self.crop:g}" + ("/mirrored" if self.flip else "")
