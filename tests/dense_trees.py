"""Small trees in the layouts of data sets with masks and boxes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (12, 8)  # width and height of every picture, unless said otherwise


def save_picture(file: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def save_mask(file: Path, values: Sequence[int], palette: bool = False) -> np.ndarray:
    """Columns of these values, as wide as each other; rows are alike."""
    mask = np.repeat(np.array(values, np.uint8), SIZE[0] // len(values))[None].repeat(SIZE[1], 0)
    image = Image.fromarray(mask)
    if palette:
        image = image.convert("P")
        image.putpalette(list(range(256)) * 3)
        image.putdata(mask.ravel().tolist())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return mask


def write_ade20k(root: Path) -> Path:
    """Three classes; in training and in validation a picture each."""
    folder = root / "ADEChallengeData2016"
    for number, split in enumerate(("training", "validation")):
        save_picture(folder / f"images/{split}/ADE_0000000{number}.jpg")
        save_mask(folder / f"annotations/{split}/ADE_0000000{number}.png", [0, 1, 3])
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1    \t0.1\t9\t1\twall",
            "2    \t0.1\t9\t1\tbuilding, edifice", "3    \t0.1\t9\t1\tsky"]  # fmt: skip
    (folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_voc(root: Path, stems: Sequence[str] = ("2007_000033",)) -> Path:
    folder = root / "VOCdevkit/VOC2012"
    for stem in stems:
        save_picture(folder / f"JPEGImages/{stem}.jpg")
        save_mask(folder / f"SegmentationClass/{stem}.png", [0, 20, 255, 1], palette=True)
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(stems) + "\n")
    return folder


CATEGORIES = [
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "wall-other-merged", "isthing": 0},
]


def write_coco(
    root: Path,
    boxes: Mapping[str, Sequence[Mapping[str, Any]]],
    kind: str = "instances_val2017",
    of_picture: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Path:
    """File name of a picture -> its annotations. of_picture: what else is said of it."""
    images, annotations = [], []
    for number, (name, own) in enumerate(boxes.items(), 1):
        save_picture(root / "val2017" / name)
        images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        images[-1] |= (of_picture or {}).get(name, {})
        annotations += [{"image_id": number, **one} for one in own]
    values = {"images": images, "annotations": annotations, "categories": CATEGORIES, **more}
    file = root / f"annotations/{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))
    return root


def write_panoptic(root: Path, ids: Sequence[int], infos: Sequence[Mapping[str, Any]]) -> Path:
    """One picture whose columns are of these segments."""
    columns = np.repeat(np.array(ids), SIZE[0] // len(ids))[None].repeat(SIZE[1], 0)
    colours = np.stack([columns % 256, columns // 256 % 256, columns // 65536], axis=-1)
    folder = root / "annotations/panoptic_val2017"
    folder.mkdir(parents=True)
    Image.fromarray(colours.astype(np.uint8)).save(folder / "1.png")
    annotation = {"file_name": "1.png", "segments_info": list(infos)}
    return write_coco(root, {"1.jpg": [annotation]}, "panoptic_val2017")
