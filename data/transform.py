"""The transform in front of an image tower: an image of any size to normalised pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.images import upright_rgb


@dataclass(frozen=True)
class ImageTransform:
    """Shorter side to `image_size` (bicubic, antialiased), centre crop, normalise per channel."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 s s"]:
        """float32, (pixel / 255 - mean) / std, of an image of any size and mode, which is turned
        upright by its EXIF tag; transparency over white."""
        # copied: Pillow's array is read-only
        pixels = torch.from_numpy(np.array(self.crop(image), dtype=np.uint8))
        channels = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return channels.div_(255).sub_(mean).div_(std)

    def crop(self, image: Image.Image) -> Image.Image:
        """The square that the tower sees, `image_size` pixels a side, RGB."""
        size = self.image_size
        image = upright_rgb(image)
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
        """Equal where the tower gets equal pixels."""
        mean = ",".join(f"{value:.6g}" for value in self.mean)
        std = ",".join(f"{value:.6g}" for value in self.std)
        return f"shorter-side-{self.image_size}-bicubic-centre-crop/mean={mean}/std={std}"


def _middle(image: Image.Image, longest: int) -> Image.Image:
    width, height = image.size
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))
