"""Parts of pictures to vectors: each is read whole, as if it were a picture of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contrastive.model.lit import LitModel
from contrastive.model.shaped import ShapedPixels
from contrastive.model.with_fit import with_fit
from data.batch import Pixels
from data.config import MAX_PIXELS
from data.transform import AnyImage
from retrieval.detail import Detail
from retrieval.embed.encode import normalised_pixels, reader_cuts
from retrieval.regions.boxes import Box

Part: TypeAlias = Image.Image | UInt8[Tensor, "3 _h _w"]
MOST_SIDE = 4  # times the model's image size: a larger picture is made smaller before it is cut


def reads_whole(model: LitModel) -> LitModel:
    """`model` as it reads parts of pictures, of which nothing is cut away: in their own shape, or
    where the tower reads squares alone, squashed."""
    return with_fit(model, "aspect" if model.vision.flexible else "squash")


def read_parts(
    model: LitModel, data: bytes, boxes: Sequence[Box], details: Sequence[Detail]
) -> list[Pixels]:
    """Pixels of parts of an image file, for `embed_pixels`. model: of `reads_whole`. Raises as
    `data.images.decode_image`."""
    picture = smaller(model, model.transform.decode(data, MAX_PIXELS))
    cuts = reader_cuts(model, details)
    return [model.transform.pixels(part_of(picture, box), cuts) for box in boxes]


def read_part(
    model: LitModel, data: bytes, box: Box, max_pixels: int, details: Sequence[Detail]
) -> dict[Detail, ShapedPixels]:
    """Normalised pixels of a part of an image file, for each of `details`. model: whatever it reads
    by. Raises as `data.images.decode_image`."""
    whole = reads_whole(model)
    picture = whole.transform.decode(data, max_pixels)
    return normalised_pixels(whole, part_of(picture, box), details)


def part_of(picture: AnyImage, box: Box) -> Part:
    """The pixels of a picture that a box covers, at least one; upright already."""
    size = (
        picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])
    )
    left, right = _span(box.left, box.right, size[0])
    top, bottom = _span(box.top, box.bottom, size[1])
    if isinstance(picture, Tensor):
        return picture[:, top:bottom, left:right]
    return picture.crop((left, top, right, bottom))


def _span(start: float, stop: float, length: int) -> tuple[int, int]:
    first = min(round(start * length), length - 1)
    return first, max(first + 1, round(stop * length))


def smaller(model: LitModel, picture: AnyImage) -> Part:
    """A picture before it is cut: resizing a dozen windows of many megapixels would take longer
    than their vectors."""
    shape = picture.shape[1:] if isinstance(picture, Tensor) else picture.size[::-1]
    scale = MOST_SIDE * model.image_size / min(shape)
    if scale >= 1:
        return picture
    height, width = (round(length * scale) for length in shape)
    return replace(model.transform, fit="aspect").at(picture, height, width)
