"""A picture and what is where in it: a mask of classes, boxes, segments."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

BACKGROUND = 0  # in masks: none of the classes
IGNORED = 255  # in masks, as Pascal VOC has it: not counted
MOST_CLASSES = 254  # as masks of 8 bits hold beside the two

Number = int | float
Box = tuple[Number, Number, Number, Number]
"""Left, top, width and height, pixels."""


@dataclass(frozen=True)
class TrueBox:
    box: Box
    label: int
    crowd: bool = False
    """Several things in one box: what falls into it counts neither for nor against."""


@dataclass(frozen=True)
class PartLabels:
    """What is known of a picture whose set is labelled in part (LVIS, arXiv:1908.03195, section 2):
    nothing of a class that has no box there and is not `absent`."""

    absent: frozenset[int] = frozenset()
    """Labels that are known not to be there."""
    incomplete: frozenset[int] = frozenset()
    """Labels of which some things have no box."""


@dataclass(frozen=True)
class Segments:
    """A picture in parts that do not overlap: each thing by itself, and each kind of stuff."""

    ids: Int32[np.ndarray, "h w"]
    """The segment that each pixel is of; 0: of none, not counted."""
    labels: Mapping[int, int]
    """Of each id. `BACKGROUND`: the segment is of none of the classes, and known to be."""
    crowds: frozenset[int] = frozenset()
    """Ids of segments that hold several things."""


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture as shown, turned by its EXIF tag, and what its data set says of it.

    Label k is the k-th class name, from 1. None: the set does not say.
    """

    key: str
    """Names it to a user."""
    image: Image.Image
    """RGB."""
    mask: UInt8[np.ndarray, "h w"] | None = None
    """The label of each pixel, `BACKGROUND` or `IGNORED`; of the image's height and width."""
    boxes: tuple[TrueBox, ...] | None = None
    partly: PartLabels | None = None
    """None: what is of a class has its box."""
    segments: Segments | None = None
