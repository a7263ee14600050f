"""What a data set outside shards must offer: its images, by number."""

from typing import Protocol, runtime_checkable

from PIL import Image


@runtime_checkable
class ImageSource(Protocol):
    """Images by number. Loader processes hold copies of it."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What names the image to a user: its path, where it has one."""

    def captions(self, row: int) -> tuple[str, ...]:
        """() where there are none."""

    def load(self, row: int, max_pixels: int) -> tuple[Image.Image, int]:
        """The image and its label, -1 for none. Raises `BadSample` where it cannot be read."""
