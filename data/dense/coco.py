"""COCO: boxes of 80 things; panoptic segments of 133 classes; COCO-Stuff's masks of 171."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.class_names import DEFAULT_TEMPLATES
from data.dense.coco_json import CocoAnnotations, CocoPicture, check_size, read_coco
from data.dense.dense_dataset import DenseDataset
from data.dense.mask_files import MaskFiles, read_mask, read_picture, read_text
from data.dense.picture import IGNORED, MOST_CLASSES, AnnotatedPicture, Segments, TrueBox
from data.errors import UsageError
from data.problems import BadSample

NO_MASKS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
"""Ids that COCO-Stuff's list names and no pixel has (street sign, hat, ...)."""


def has_instances(root: Path) -> bool:
    return bool(_splits(_json_files(root, "instances")))


def has_panoptic(root: Path) -> bool:
    return bool(_splits(_json_files(root, "panoptic")))


def has_stuff(root: Path) -> bool:
    return _labels_file(root).is_file() and bool(_stuff_folders(root))


def open_instances(root: Path, split: str, name: str) -> DenseDataset:
    """annotations/instances_SPLIT.json and the images in SPLIT/ or images/SPLIT/: boxes.

    split: val2017, ...; "" takes what there is, of several the one for validation.
    """
    split, file = _chosen(root, _json_files(root, "instances"), split, "instances_SPLIT.json")
    found, noted = read_coco(file), Counter[str]()
    boxes = _Boxes(_image_folder(root, split), found.pictures, found.boxes(noted))
    names = [name.replace("_", " ") for name in found.names]  # LVIS joins words so
    return DenseDataset(name, names, DEFAULT_TEMPLATES, boxes, noted=noted)


def open_panoptic(root: Path, split: str, name: str) -> DenseDataset:
    """annotations/panoptic_SPLIT.json, panoptic_SPLIT/*.png beside it, and the images: segments,
    and masks of their classes, crowds too. split: as `open_instances`.

    A pixel of a PNG is of the segment R + 256 G + 65536 B; 0 is unlabelled.
    """
    split, file = _chosen(root, _json_files(root, "panoptic"), split, "panoptic_SPLIT.json")
    found = read_coco(file)
    folder = _image_folder(root, split)
    names = [_clean(name) for name in found.names]
    if len(names) > MOST_CLASSES:
        raise UsageError(f"{file}: {len(names)} categories; masks of 8 bits hold {MOST_CLASSES}")
    source = _Panoptic(folder, file.with_suffix(""), found)
    noted = Counter(crowd=sum(source.crowds(one) for one in found.pictures))
    return DenseDataset(name, names, DEFAULT_TEMPLATES, source, stuff=found.stuff, noted=+noted)


def open_stuff(root: Path, split: str, name: str) -> DenseDataset:
    """stuffthingmaps/SPLIT/*.png or annotations/SPLIT/*.png, labels.txt, and the images: masks.

    split: as `open_instances`. A mask's value is a line of labels.txt less 1, 255 is unlabelled.
    """
    split, masks = _chosen(root, _stuff_folders(root), split, "stuffthingmaps/SPLIT/*.png")
    names, values = [], {IGNORED: IGNORED}
    for line in read_text(_labels_file(root), "COCO-Stuff's labels.txt").splitlines():
        match = re.fullmatch(r"(\d+): *(.+)", line.strip())
        number = int(match[1]) if match else -1
        if match is None or number > IGNORED - 1:
            raise UsageError(f"{_labels_file(root)}: {line!r} is no line such as 1: person")
        if number and number not in NO_MASKS:
            names.append(_clean(match[2]))
            values[number - 1] = len(names)
    if not names:
        raise UsageError(f"{_labels_file(root)} has no classes; expected lines such as 1: person")
    folder, found = _image_folder(root, split), sorted(masks.glob("*.png"))
    files = MaskFiles([folder / f"{mask.stem}.jpg" for mask in found], found, values)
    return DenseDataset(name, names, DEFAULT_TEMPLATES, files)


@dataclass(frozen=True)
class _Boxes:
    folder: Path
    pictures: Sequence[CocoPicture]
    boxes: Sequence[tuple[TrueBox, ...]]

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, row: int) -> str:
        return str(self.folder / self.pictures[row].file_name)

    def load(self, row: int) -> AnnotatedPicture:
        image = read_picture(Path(self.key(row)))
        picture = self.pictures[row]
        check_size(image, picture)
        return AnnotatedPicture(self.key(row), image, boxes=self.boxes[row], partly=picture.partly)


@dataclass(frozen=True)
class _Panoptic:
    folder: Path
    masks: Path
    annotations: CocoAnnotations

    def __len__(self) -> int:
        return len(self.annotations.pictures)

    def key(self, row: int) -> str:
        return str(self.folder / self.annotations.pictures[row].file_name)

    def crowds(self, picture: CocoPicture) -> int:
        return sum(bool(one.get("iscrowd", 0)) for one in self._infos(picture))

    def load(self, row: int) -> AnnotatedPicture:
        picture = self.annotations.pictures[row]
        here = self.annotations.of_picture[picture.id]
        file = self.masks / str(here[0].get("file_name")) if here else self.masks
        if not file.is_file():
            raise BadSample("no_mask", f"no PNG of it in {self.masks}")
        image = read_picture(Path(self.key(row)))
        colours = read_mask(file, ["RGB"], image).astype(np.int32)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        infos: dict[int, dict[str, Any]] = {one["id"]: one for one in self._infos(picture)}
        numbers, places = np.unique(ids, return_inverse=True)
        if set(numbers.tolist()) - {0} != set(infos):
            raise BadSample("segments", f"those in {file} are not those of the list")
        labels = {number: self.annotations.label(one) for number, one in infos.items()}
        known = {number: label for number, label in labels.items() if label is not None}
        if len(known) < len(labels):
            raise BadSample("mask_labels", f"a segment of {file} is of an unknown category")
        of_number = np.array([known.get(n, IGNORED) for n in numbers.tolist()], np.uint8)
        crowds = frozenset(number for number, one in infos.items() if one.get("iscrowd", 0))
        segments = Segments(ids, known, crowds)
        mask = of_number[places].reshape(ids.shape)
        return AnnotatedPicture(self.key(row), image, mask, segments=segments)

    def _infos(self, picture: CocoPicture) -> list[dict[str, Any]]:
        here = self.annotations.of_picture[picture.id]
        infos = here[0].get("segments_info") if here else []
        if not isinstance(infos, list) or not all(map(_is_segment, infos)):
            raise UsageError(f"{self.annotations.file}: picture {picture.id} has no segments_info")
        return infos


def _is_segment(one: object) -> bool:
    return isinstance(one, dict) and type(one.get("id")) is int


# ---- files -----------------------------------------------------------------------------------


def _json_files(root: Path, what: str) -> dict[str, Path]:
    """By split."""
    files = [*root.glob(f"{what}_*.json"), *(root / "annotations").glob(f"{what}_*.json")]
    return {file.stem.removeprefix(f"{what}_"): file for file in sorted(files)}


def _stuff_folders(root: Path) -> dict[str, Path]:
    """By split."""
    tops = (root / "stuffthingmaps", root / "annotations")
    folders = [f for top in tops for f in sorted(top.glob("*")) if any(f.glob("*.png"))]
    return {f.name: f for f in folders if not f.name.startswith("panoptic_")}


def _labels_file(root: Path) -> Path:
    below = root / "stuffthingmaps/labels.txt"
    return below if below.is_file() else root / "labels.txt"


def _splits(found: Iterable[str]) -> list[str]:
    return sorted(found, key=lambda split: (not split.startswith("val"), split))


def _chosen(root: Path, found: Mapping[str, Path], split: str, what: str) -> tuple[str, Path]:
    """The split that is meant, and its file or folder."""
    splits = _splits(found)
    if split in found:
        return split, found[split]
    if split or not splits:
        has = f", only {', '.join(splits)}" if splits else ""
        raise UsageError(f"{root} has no {what.replace('SPLIT', split or 'SPLIT')}{has}")
    validation = [one for one in splits if one.startswith("val")]
    if len(validation) != 1 and len(splits) > 1:
        raise UsageError(f"{root} has {', '.join(splits)}; say which, such as split={splits[0]}")
    return splits[0], found[splits[0]]


def _image_folder(root: Path, split: str) -> Path:
    folders = (root / split, root / "images" / split, root / "images")
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UsageError(f"{root} has no images; expected them in {folders[0]} or {folders[1]}")


def _clean(name: str) -> str:
    """Words for a prompt: `wall` for wall-other-merged, `floor wood` for floor-wood."""
    return re.sub(r"(-other|-stuff|-merged)+$", "", name).replace("-", " ")
