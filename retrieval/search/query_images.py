"""Queries as they are passed: texts, and images read."""

from typing import TYPE_CHECKING, Any

from data.image_headers import names_image

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def read_query_image(file: str) -> "Image.Image":
    """The image, RGB. Raises `UsageError` for one that cannot be read."""
    from data.given import as_rgb

    return as_rgb(file)


def read_queries(queries: Any) -> "list[str | Image.Image | Tensor]":
    """Texts, and images read: a text that is the path of an image file is that image, as on the
    command line. One text or image is a list of one.

    Raises `UsageError` for what names an image and is none, and for what is neither.
    """
    from data.given import as_rgb, is_normalised, list_images

    read = []
    for query in list_images(queries):
        is_text = isinstance(query, str) and not names_image(query)
        read.append(query if is_text or is_normalised(query) else as_rgb(query))
    return read
