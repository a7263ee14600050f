"""ObjectNet (Barbu et al., NeurIPS 2019) with the 113 classes that it shares with ImageNet."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from data.errors import UsageError
from retrieval.evaluation.datasets.eval_dataset import EvalDataset
from retrieval.evaluation.datasets.image_folders import (
    ImageFiles,
    class_folders,
    find_folder,
    list_images,
)
from retrieval.evaluation.datasets.imagenet import imagenet_templates

RED = ((255, 255), (0, 0), (0, 0))  # lowest and highest value of each channel


def open_objectnet(root: Path, name: str) -> EvalDataset:
    """ROOT/images/<Folder>/*.png and ROOT/mappings, or the same below ROOT/objectnet-1.0.

    The protocol of zero-shot models (CLIP_benchmark, WiSE-FT): the candidates are the 113 classes
    by ObjectNet's own names, in lower case, in CLIP's ImageNet templates; images of the other
    200 folders are left out; the red border is taken off. Classes are in the order of their
    folders' names.
    """
    root = find_folder(root, "objectnet-1.0")
    mappings = root / "mappings"
    of_folder = _read_json(mappings / "folder_to_objectnet_label.json")
    imagenet = _imagenet_classes(mappings)
    scored = sorted(folder for folder, label in of_folder.items() if label in imagenet)
    count = Counter(of_folder[folder] for folder in scored)
    for label in imagenet:
        if count[label] != 1:
            raise UsageError(
                f"{mappings}/folder_to_objectnet_label.json names {count[label]} folders for "
                f"{label!r} of objectnet_to_imagenet_1k.json; expected one"
            )
    images = root / "images"
    if not images.is_dir():
        raise UsageError(f"{root} has no folder images; expected images and mappings")
    found = class_folders(images)
    missing = sorted(set(scored) - set(found))
    if missing:
        raise UsageError(
            f"{images} has no folder {missing[0]}; expected the {len(scored)} that "
            "objectnet_to_imagenet_1k.json speaks of"
        )
    paths, labels = [], []
    left_out = 0
    for folder in found:
        own = list_images(images / folder)
        if folder in scored:
            paths += own
            labels += [scored.index(folder)] * len(own)
        elif folder in of_folder:
            left_out += len(own)
        else:
            raise UsageError(f"{images}/{folder} is not in folder_to_objectnet_label.json")
    return EvalDataset(
        name,
        [of_folder[folder].lower() for folder in scored],
        imagenet_templates(),
        images=ImageFiles(paths, labels, crop=without_red_border),
        left_out=left_out,
    )


def without_red_border(image: Image.Image) -> Image.Image:
    """An RGB image less its outermost pixels where these are pure red: one or two all round.

    ObjectNet's documents speak of 1 pixel, its organisers' images and code have 2.
    """
    for _ in range(2):
        width, height = image.size
        sides = [(0, 0, width, 1), (0, height - 1, width, height)]
        sides += [(0, 0, 1, height), (width - 1, 0, width, height)]
        if min(width, height) < 3 or any(image.crop(s).getextrema() != RED for s in sides):
            break
        image = image.crop((1, 1, width - 1, height - 1))
    return image


def _imagenet_classes(mappings: Path) -> dict[str, list[int]]:
    """Per ObjectNet class that overlaps ImageNet, the classes of ImageNet (0 to 999) it covers.

    The files name ImageNet's classes by their synonyms ("; " between several classes), give each
    name a line, and each line the number that PyTorch's models give the class.
    """
    names = _read_lines(mappings / "imagenet_to_label_2012_v2")
    file = mappings / "pytorch_to_imagenet_2012_id.json"
    numbers = _read_json(file, (int, str))
    try:
        of_line = {int(line): int(number) for number, line in numbers.items()}
    except ValueError as error:
        raise UsageError(f"{file} is not from numbers to numbers: {error}") from None
    lines = {name: line for line, name in enumerate(names)}
    file = mappings / "objectnet_to_imagenet_1k.json"
    classes = {}
    for label, covered in _read_json(file).items():
        try:
            classes[label] = [of_line[lines[name.strip()]] for name in covered.split(";")]
        except KeyError as error:
            raise UsageError(
                f"{file}: {label!r} covers {error.args[0]!r}, which is no line of "
                "imagenet_to_label_2012_v2 that pytorch_to_imagenet_2012_id.json numbers"
            ) from None
    return classes


def _read_json(file: Path, kinds: tuple[type, ...] = (str,)) -> dict[str, Any]:
    """An object of one or more values, each of these kinds."""
    try:
        values = json.loads(_read(file))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} is not JSON: {error}") from None
    whole = isinstance(values, dict) and all(type(v) in kinds for v in values.values())
    if not whole or not values:
        raise UsageError(
            f"{file} is no JSON object of names; expected ObjectNet's own mapping file"
        )
    return values


def _read_lines(file: Path) -> list[str]:
    return [line.strip() for line in _read(file).splitlines()]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(
            f"{file} cannot be read: {reason}; expected ObjectNet's own mapping files there"
        ) from None
