"""COCO's annotation files: pictures, categories, boxes with crowds."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data.dense.mask_files import read_text
from data.dense.picture import Box, Number, PartLabels, TrueBox
from data.errors import UsageError
from data.problems import BadSample

ROUNDING = 0.01  # pixels; COCO writes boxes with two decimals


@dataclass(frozen=True)
class CocoPicture:
    id: int | str
    file_name: str
    size: tuple[int, int]
    """Width and height, pixels."""
    partly: PartLabels | None = None


@dataclass
class CocoAnnotations:
    """A file's contents, categories numbered from 1 in the order of their ids."""

    file: Path
    pictures: list[CocoPicture]
    names: list[str]
    labels: dict[int, int]
    """Of each category's id."""
    stuff: frozenset[int]
    """Labels."""
    of_picture: dict[int | str, list[dict[str, Any]]] = field(default_factory=dict)
    """Annotations as they stand in the file, by the picture's id."""
    unknown_pictures: int = 0
    """Annotations of pictures that are not in the list."""

    def boxes(self, noted: Counter[str]) -> list[tuple[TrueBox, ...]]:
        """Of each picture. noted: what is special is counted there, as `DenseDataset.noted` says.

        A box that reaches beyond its picture stays as it is, as pycocotools has it. Raises
        `UsageError` for an annotation without a box or a category.
        """
        found = []
        for picture in self.pictures:
            here = []
            for one in self.of_picture.get(picture.id, ()):
                box, label = self._box(one), self.label(one)
                if label is None:
                    noted["unknown_class"] += 1
                elif not (all(map(_is_finite, box)) and box[2] > 0 and box[3] > 0):
                    noted["box_empty"] += 1
                else:
                    crowd = bool(one.get("iscrowd", 0))
                    noted["crowd"] += crowd
                    noted["box_outside"] += _is_outside(box, picture.size)
                    here.append(TrueBox(box, label, crowd))
            noted["no_boxes"] += not here
            noted["partly_labelled"] += picture.partly is not None
            found.append(tuple(here))
        noted["unknown_picture"] += self.unknown_pictures
        for kind in [kind for kind, count in noted.items() if not count]:
            del noted[kind]
        return found

    def label(self, annotation: Mapping[str, Any]) -> int | None:
        """Of its category; None where that is unknown. Raises `UsageError` without one."""
        number = annotation.get("category_id")
        if type(number) is not int:
            raise UsageError(f"{self.file}: an annotation's category_id is {number!r}")
        return self.labels.get(number)

    def _box(self, annotation: Mapping[str, Any]) -> Box:
        box = annotation.get("bbox")
        if not isinstance(box, list) or [type(n) in (int, float) for n in box] != [True] * 4:
            raise UsageError(f"{self.file}: an annotation's bbox is {box!r}, not four numbers")
        left, top, width, height = box
        return left, top, width, height


def read_coco(file: Path) -> CocoAnnotations:
    """Raises `UsageError` for what is no such file."""
    try:
        given = json.loads(read_text(file, "COCO's annotations"))
        return _parsed(file, given)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, UsageError):
            raise
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file} is no file of COCO's annotations ({why})") from None


def check_size(image: Image.Image, picture: CocoPicture) -> None:
    """Raises `BadSample` (`picture_size`) for an image of another size than its annotations say."""
    if image.size != picture.size:
        sizes = f"{image.width} x {image.height}", f"{picture.size[0]} x {picture.size[1]}"
        raise BadSample("picture_size", f"{sizes[0]} pixels, its annotations say {sizes[1]}")


def _parsed(file: Path, given: Mapping[str, Any]) -> CocoAnnotations:
    categories = sorted(given["categories"], key=lambda one: one["id"])
    names = [str(one["name"]) for one in categories]
    labels = {one["id"]: label for label, one in enumerate(categories, 1)}
    pictures = [
        CocoPicture(
            one["id"],
            _file_name(one),
            (int(one["width"]), int(one["height"])),
            _part_labels(one, labels),
        )
        for one in given["images"]
    ]
    if not pictures or not names:
        raise ValueError(f"{len(pictures)} pictures, {len(names)} categories")
    if len(labels) < len(names) or len({one.id for one in pictures}) < len(pictures):
        raise ValueError("an id stands twice")
    found = CocoAnnotations(
        file,
        pictures,
        names,
        labels,
        frozenset(labels[one["id"]] for one in categories if not one.get("isthing", 1)),
    )
    known: dict[int | str, list[dict[str, Any]]] = {one.id: [] for one in pictures}
    for one in given["annotations"]:
        if not isinstance(one, dict):
            raise TypeError(f"an annotation is {one!r}")
        if one["image_id"] in known:
            known[one["image_id"]].append(one)
        else:
            found.unknown_pictures += 1
    found.of_picture = known
    return found


def _file_name(picture: Mapping[str, Any]) -> str:
    """LVIS names the folder too, by an address such as .../val2017/000000397133.jpg."""
    if "coco_url" in picture and "file_name" not in picture:
        return "/".join(str(picture["coco_url"]).split("/")[-2:])
    return str(picture["file_name"])


def _part_labels(picture: Mapping[str, Any], labels: Mapping[int, int]) -> PartLabels | None:
    """As LVIS says them. Categories that are not in the list are in no box either."""
    if "neg_category_ids" not in picture:
        return None
    names = ("neg_category_ids", "not_exhaustive_category_ids")
    return PartLabels(
        *(frozenset(labels[id] for id in picture.get(name, ()) if id in labels) for name in names)
    )


def _is_finite(number: Number) -> bool:
    """Whole numbers that JSON may write, and no float holds, are not."""
    return -sys.float_info.max <= number <= sys.float_info.max


def _is_outside(box: Box, size: Sequence[int]) -> bool:
    left, top, width, height = box
    least, most = min(left, top), max(left + width - size[0], top + height - size[1])
    return least < -ROUNDING or most > ROUNDING
