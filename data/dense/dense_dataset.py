"""A set of annotated pictures: its class names, its pictures by number, and what is wrong there."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from data.config import OnError
from data.dense.picture import AnnotatedPicture
from data.problems import Problem, attempt, skip_or_raise


@runtime_checkable
class PictureSource(Protocol):
    """Annotated pictures by number. Loader processes may hold copies of it."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """What names the picture to a user."""

    def load(self, row: int) -> AnnotatedPicture:
        """Raises `BadSample` for a picture that cannot be used: `unreadable` (it or its mask),
        `no_mask`, `mask_size` (another than the picture's), `mask_labels` (outside the list),
        `picture_size` (another than the annotations say), `segments` (that do not fit the mask, or
        their list)."""


@dataclass
class DenseDataset:
    """Annotated pictures, and the texts to find things in them with.

    Iterating gives those that can be used, in order; `dataset.pictures.load(row)` one of them.
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    pictures: PictureSource
    background: bool = False
    """Whether 0 in masks is measured as a class of its own (Pascal VOC). Else it is in none."""
    stuff: frozenset[int] = frozenset()
    """Labels of what has no single things: one segment a picture holds all of it."""
    noted: Counter[str] = field(default_factory=Counter)
    """What the annotations hold that the protocol has a rule for, of the whole set: `crowd`,
    `box_outside` (kept), `box_empty`, `unknown_class`, `unknown_picture` (left out), `no_boxes`
    (pictures that have none, which count), `partly_labelled` (pictures of which not every class is
    known)."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many pictures the last pass left out, by the reason."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[AnnotatedPicture]:
        return (picture for _, picture in self.read())

    def read(
        self, share: tuple[int, int] = (0, 1), on_error: OnError = "skip"
    ) -> Iterator[tuple[int, AnnotatedPicture]]:
        """(row, picture). share: (rank, ranks); ranks take pictures in turn.

        Pictures that cannot be used are counted in `skipped`; with on_error "raise" the first is
        raised as a `DataError`.
        """
        self.skipped.clear()
        for row in range(share[0], len(self), share[1]):
            found = attempt(self.pictures.key(row), partial(self.pictures.load, row))
            if isinstance(found, Problem):
                skip_or_raise(found, "", on_error, self.skipped)
            else:
                yield row, found
