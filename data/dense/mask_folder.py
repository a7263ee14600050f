"""Folders of pictures with masks and a list of names, as `python -m data.scenes` writes them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from data.class_names import (
    CLASS_NAMES_FILE,
    DEFAULT_TEMPLATES,
    read_class_names,
)
from data.dense.coco_json import CocoAnnotations, CocoPicture, check_size, read_coco
from data.dense.dense_dataset import DenseDataset
from data.dense.mask_files import MaskFiles, class_values
from data.dense.picture import (
    BACKGROUND,
    IGNORED,
    MOST_CLASSES,
    AnnotatedPicture,
    Segments,
    TrueBox,
)
from data.errors import UsageError
from data.image_headers import images_in
from data.problems import BadSample

ANNOTATIONS = "annotations.json"


def is_mask_folder(root: Path) -> bool:
    return all((root / part).is_dir() for part in ("images", "masks"))


def open_mask_folder(root: Path, split: str, name: str) -> DenseDataset:
    """images/NAME.jpg|png|..., masks/NAME.png, classnames.txt; annotations.json where there is one.

    In a mask of 8 bits 0 is background, k the k-th line of classnames.txt, 255 is not counted.
    annotations.json is COCO's of instances, its categories those lines; where each has a mask (run
    lengths, uncompressed), the pictures have segments. Has no splits.
    """
    if split:
        raise UsageError(f"split {split}: {root} is one folder of masks, without splits")
    names = read_class_names(root / CLASS_NAMES_FILE)
    if len(names) > MOST_CLASSES:
        raise UsageError(f"{root}: {len(names)} classes; masks of 8 bits hold {MOST_CLASSES}")
    images = images_in(root / "images") if (root / "images").is_dir() else []
    if not images:
        raise UsageError(f"{root / 'images'} has no pictures")
    masks = [root / "masks" / f"{image.stem}.png" for image in images]
    files = MaskFiles(images, masks, class_values(len(names), zero=BACKGROUND))
    dataset = DenseDataset(name, names, DEFAULT_TEMPLATES, files, background=True)
    if not (root / ANNOTATIONS).is_file():
        return dataset
    found, noted = read_coco(root / ANNOTATIONS), Counter[str]()
    if found.names != names:
        raise UsageError(f"{found.file} has other categories than {root / CLASS_NAMES_FILE}")
    of_file = {
        picture.file_name: (picture, boxes, found.of_picture[picture.id])
        for picture, boxes in zip(found.pictures, found.boxes(noted), strict=True)
    }
    if len(of_file) < len(found.pictures):
        raise UsageError(f"{found.file} lists a picture twice")
    return replace(dataset, pictures=_WithBoxes(files, found, of_file), noted=noted)


@dataclass(frozen=True)
class _WithBoxes:
    files: MaskFiles
    annotations: CocoAnnotations
    of_file: Mapping[str, tuple[CocoPicture, tuple[TrueBox, ...], list[dict[str, Any]]]]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, row: int) -> str:
        return self.files.key(row)

    def load(self, row: int) -> AnnotatedPicture:
        picture, known = self.files.load(row), self.of_file.get(self.files.images[row].name)
        if known is None or picture.mask is None:
            return picture
        check_size(picture.image, known[0])
        return replace(picture, boxes=known[1], segments=self._segments(picture.mask, known[2]))

    def _segments(
        self, mask: UInt8[np.ndarray, "h w"], annotations: Sequence[Mapping[str, Any]]
    ) -> Segments | None:
        """Where each annotation has run lengths. Raises `BadSample` where they are not the mask."""
        ground = len(annotations) + 1
        ids = np.where(mask == BACKGROUND, ground, 0).astype(np.int32)
        labels, crowds = {ground: BACKGROUND}, []
        for number, one in enumerate(annotations, 1):
            seen = decode_runs(one.get("segmentation"), mask.shape)
            label = self.annotations.label(one)
            if seen is None or label is None:
                return None
            if ids[seen].any():
                raise BadSample("segments", "two of them overlap, or reach beyond the mask")
            ids[seen], labels[number] = number, label
            crowds += [number] * bool(one.get("iscrowd", 0))
        ids[mask == IGNORED] = 0
        label_of = np.array([IGNORED, *(labels[n] for n in sorted(labels))], np.uint8)
        if (label_of[ids] != mask).any():
            raise BadSample("segments", "they are not what the mask shows")
        return Segments(ids, labels, frozenset(crowds))


def decode_runs(given: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"] | None:
    """The pixels of COCO's uncompressed run lengths: down the columns, outside first.

    None for what is no such, as polygons. Raises `BadSample` where they do not fill `shape`.
    """
    counts = given.get("counts") if isinstance(given, dict) else None
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return None
    if given.get("size") != list(shape) or sum(counts) != shape[0] * shape[1]:
        raise BadSample("segments", f"run lengths of {given.get('size')}, a mask of {list(shape)}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(shape[::-1]).T
