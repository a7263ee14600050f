"""Which queries are images: paths of image files, and what is no text."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UsageError
from data.image_headers import has_image_suffix

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def names_image(query: str) -> bool:
    """Whether a query is the file of an image rather than a text. Raises `UsageError` for what
    looks like a file's name and is none, and for the path of a folder."""
    if os.sep in query and Path(query).is_dir():
        raise UsageError(f"{query} is a folder; name images in it, such as {Path(query)}/*.jpg")
    if not has_image_suffix(query):
        return False
    if Path(query).is_file():
        return True
    if " " in query:
        return False
    raise UsageError(f"{query}: there is no such image")


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
