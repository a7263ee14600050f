"""The transform in front of an image tower: an image of any size to normalised pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from data.batch import Cut, Pixels
from data.config import Fit
from data.errors import UsageError
from data.images import decode_image, upright_rgb
from data.pixels import as_image, as_pixels, decode_pixels

AnyImage: TypeAlias = Image.Image | UInt8[Tensor, "3 h w"]
Cuts: TypeAlias = Callable[[tuple[int, int]], Sequence[Cut]]
"""What an image of (height, width) becomes: one cut for each way in which it is read."""

VERSIONS = (1, 2)


@dataclass(frozen=True)
class ImageTransform:
    """To a square of `image_size`, or what else is asked for (bicubic, antialiased), and normalised
    per channel."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    version: int = 1
    """Who resizes: 1 Pillow, 2 torch, in a fraction of the time. Both on 8-bit values, which are a
    level apart here and there. A tower keeps the version that it was made with."""
    fit: Fit = "crop"
    """crop: the shorter side is resized, the middle cut out. squash: both sides are resized, the
    aspect ratio is lost. aspect: both are resized to a rectangle, nothing is cut away."""

    def __call__(self, image: AnyImage) -> Float[Tensor, "3 s s"]:
        """float32, (pixel / 255 - mean) / std, of an image of any size and mode, which is turned
        upright by its EXIF tag; transparency over white."""
        return self.normalise(self.square(image))

    def read(self, data: bytes, max_pixels: int) -> UInt8[Tensor, "3 s s"]:
        """The square that the tower sees of an image file. Raises as `data.images.decode_image`."""
        return self.square(self.decode(data, max_pixels))

    def decode(self, data: bytes, max_pixels: int) -> AnyImage:
        """An image file as this version resizes it; the pixels are the same. Raises as
        `data.images.decode_image`."""
        return (decode_image if self.version == 1 else decode_pixels)(data, max_pixels)

    def at(self, image: AnyImage, height: int, width: int) -> UInt8[Tensor, "3 t u"]:
        """What the tower sees at this size, before it is normalised; a square unless `fit` is
        aspect."""
        if self.fit != "aspect":
            if height != width:
                raise ValueError(f"fit {self.fit} gives squares, not {height} x {width} px")
            return replace(self, image_size=height).square(image)
        if self.version == 1:
            image = image if isinstance(image, Image.Image) else as_image(image)
            resized = upright_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
            return as_pixels(resized).contiguous()
        if isinstance(image, Image.Image):
            image = as_pixels(upright_rgb(image))
        return _resize(image, (width, height)).contiguous()

    def pixels(self, image: AnyImage, cuts: Cuts | None = None) -> Pixels:
        """What the tower sees, before it is normalised: a square, or an image by each of `cuts`."""
        if cuts is None:
            return self.square(image)
        if isinstance(image, Image.Image):
            image = upright_rgb(image)
        shape = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]
        sizes: dict[tuple[int, int], Tensor] = {}
        asked = cuts((shape[0], shape[1]))
        for height, width, _ in asked:
            if (height, width) not in sizes:
                sizes[height, width] = self.at(image, height, width)
        return [(cut, sizes[cut.height, cut.width]) for cut in asked]

    def check_square(self) -> None:
        """Raise `UsageError` where `square` has none to give."""
        if self.fit == "aspect":
            raise UsageError(
                "fit aspect gives images of many shapes, which exports, and training on pixels, do "
                "not read; allowed here: crop, squash"
            )

    def square(self, image: AnyImage) -> UInt8[Tensor, "3 s s"]:
        """The square that the tower sees, before it is normalised. Raises as `check_square`."""
        self.check_square()
        if self.version == 1:
            image = image if isinstance(image, Image.Image) else as_image(image)
            return as_pixels(self.crop(image)).contiguous()
        if isinstance(image, Image.Image):
            image = as_pixels(upright_rgb(image))
        height, width = image.shape[1:]
        left, top, right, bottom = self._read_part(width, height)
        image = image[:, top:bottom, left:right]
        new = self._resized(right - left, bottom - top)
        if new != (right - left, bottom - top):
            image = _resize(image, new)
        left, top = self._corner(new)
        return image[:, top : top + self.image_size, left : left + self.image_size].contiguous()

    def normalise(self, pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
        """What the tower takes, on the pixels' device."""
        mean, std = torch.tensor([self.mean, self.std]).view(2, 3, 1, 1)
        if pixels.is_cuda:  # by copies that do not wait for what the GPU does
            mean = mean.pin_memory().to(pixels.device, non_blocking=True)
            std = std.pin_memory().to(pixels.device, non_blocking=True)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def crop(self, image: Image.Image) -> Image.Image:
        """The square by Pillow, as version 1 has it, RGB."""
        image = upright_rgb(image)
        box = self._read_part(*image.size)
        if box != (0, 0, *image.size):
            image = image.crop(box)
        new = self._resized(*image.size)
        if new != image.size:
            image = image.resize(new, Image.Resampling.BICUBIC)
        left, top = self._corner(new)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the square is cut out."""
        if self.fit == "squash":
            return self.image_size, self.image_size
        short = min(width, height)
        return int(self.image_size * width / short), int(self.image_size * height / short)

    def _corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """Left and top of the square."""
        width, height = resized
        return round((width - self.image_size) / 2), round((height - self.image_size) / 2)

    def fingerprint(self) -> str:
        """Equal where the tower gets equal pixels."""
        mean = ",".join(f"{value:.6g}" for value in self.mean)
        std = ",".join(f"{value:.6g}" for value in self.std)
        by = "" if self.version == 1 else f"-version-{self.version}"
        if self.fit != "crop":
            return f"{self.fit}-{self.image_size}-bicubic{by}/mean={mean}/std={std}"
        return f"shorter-side-{self.image_size}-bicubic{by}-centre-crop/mean={mean}/std={std}"

    def _read_part(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box (left, top, right, bottom) that is resized: where the aspect ratio is kept, all
        but the ends of a strip, of which 1 x 60000 pixels would become 224 x 13 million."""
        longest = 16 * min(width, height) if self.fit == "crop" else max(width, height)
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        return left, top, min(width, left + longest), min(height, top + longest)


def _resize(pixels: UInt8[Tensor, "3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "3 t u"]:
    """To (width, height), as torchvision.transforms.v2 does it."""
    pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # with this stride torch takes it for a batch of channels-last images, which it resizes faster
    batch = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
    return F.interpolate(batch, size[::-1], mode="bicubic", align_corners=False, antialias=True)[0]
