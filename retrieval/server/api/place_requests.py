"""The bodies of requests that ask where in an image something is."""

from pydantic import Field, model_validator

from retrieval.regions.boxes import check_box
from retrieval.server.requests import ImageToLabel, OneImage, Picture, Size, Strict

MOST_WINDOWS = 50  # of a request: at a fine patch size they take seconds


class Example(Picture):
    """An image of what is looked for, or the part of one that shows it."""

    box: list[float] | None = Field(default=None, description="As in a search.")

    @model_validator(mode="after")
    def _part(self) -> "Example":
        if self.box is not None:
            check_box(self.box)
        return self


class WindowFields(Strict):
    """What a map is made of."""

    patch_size: int | None = Size
    windows: list[int] | None = Field(
        default=None,
        min_length=1,
        description="In place of patches, windows that overlap by half, each read as an image of "
        "its own: how many a side, for each size, such as [3, 5].",
    )

    @model_validator(mode="after")
    def _few_windows(self) -> "WindowFields":
        windows = self.windows or []
        if any(each < 1 for each in windows) or sum(each**2 for each in windows) > MOST_WINDOWS:
            raise ValueError(
                f"windows: each 1 or more a side, and at most {MOST_WINDOWS} in all, such as [3, 5]"
            )
        return self


class SegmentRequest(ImageToLabel, WindowFields):
    """An image, and what its pixels may be of."""

    labels: list[str] = Field(min_length=1, max_length=254)
    background: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="Least cosine of a pixel and its label; below, it is of none.",
    )


class DetectRequest(ImageToLabel, WindowFields):
    """An image, and what may be in it: labels or examples."""

    labels: list[str] | None = Field(default=None, min_length=1, max_length=254)
    examples: list[Example] | None = Field(
        default=None, min_length=1, max_length=8, description="Images of what is looked for."
    )
    background: float = Field(
        ge=-1, le=1, description="Least cosine of a pixel and its label, and of a box's score."
    )

    @model_validator(mode="after")
    def _labels_or_examples(self) -> "DetectRequest":
        if (self.labels is None) == (self.examples is None):
            raise ValueError("exactly one of labels and examples is needed")
        if self.examples is not None and self.templates is not None:
            raise ValueError("templates: are for labels")
        return self


class MapRequest(OneImage, WindowFields):
    """An image, and what is looked for in it."""

    text: str = Field(min_length=1, description="What the text tower reads.")
