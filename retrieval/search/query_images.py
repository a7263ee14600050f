"""Treat a query that is an image path as an image query."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UsageError
from data.image_headers import has_image_suffix
from data.problems import BadSample

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000


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
    from data.images import decode_image

    try:
        return decode_image(Path(file).read_bytes(), MAX_PIXELS)
    except (BadSample, OSError) as error:
        raise UsageError(f"{file} cannot be read as an image: {error}") from error
