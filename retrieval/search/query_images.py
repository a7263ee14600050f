"""Queries as they are passed: texts, images read, and mixes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from data.errors import UsageError
from data.image_headers import names_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Mix:
    """One query of several: the weighted sum of their unit-norm vectors, of unit norm again.

    `Mix([("beach.jpg", 1.0), ("at night", 0.5), ("people", -0.5)])` is like the picture, more at
    night and away from people. parts: texts and images, as `Searcher.search` takes them, with
    weights.
    """

    parts: Sequence[tuple[Any, float]]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("a mix needs at least one text or image")


Parts: TypeAlias = Sequence[tuple[Any, float]]
"""Of one query: texts, and images read, with weights."""


def read_query_image(file: str) -> "Image.Image":
    """The image, RGB. Raises `UsageError` for one that cannot be read."""
    from data.given import as_rgb

    return as_rgb(file)


def read_queries(queries: Any) -> list[Parts]:
    """Texts, images read, and mixes of both: a text that is the path of an image file is that
    image, as on the command line. One query is a list of one.

    Raises `UsageError` for what names an image and is none, and for what is none of these.
    """
    from data.given import list_images

    given = [queries] if isinstance(queries, Mix) else list_images(queries)
    mixes = [one.parts if isinstance(one, Mix) else [(one, 1.0)] for one in given]
    return [[(_read(part), weight) for part, weight in parts] for parts in mixes]


def _read(query: Any) -> Any:
    from data.given import as_rgb, is_normalised

    is_text = isinstance(query, str) and not names_image(query)
    return query if is_text or is_normalised(query) else as_rgb(query)
