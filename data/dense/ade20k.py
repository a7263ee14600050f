"""ADE20K as its scene parsing challenge has it: 150 classes, of things and stuff."""

from pathlib import Path

from data.class_names import DEFAULT_TEMPLATES
from data.dense.dense_dataset import DenseDataset
from data.dense.mask_files import MaskFiles, class_values, read_text
from data.dense.picture import IGNORED, MOST_CLASSES
from data.errors import UsageError

FOLDER = "ADEChallengeData2016"
CLASSES = "objectInfo150.txt"


def find_ade20k(root: Path) -> Path | None:
    """The set's folder: `root` or in it."""
    found = (folder for folder in (root, root / FOLDER) if (folder / CLASSES).is_file())
    return next(found, None)


def open_ade20k(root: Path, split: str, name: str) -> DenseDataset:
    """images/SPLIT/*.jpg, annotations/SPLIT/*.png, objectInfo150.txt.

    split: validation (also "") or training. In masks k is the k-th class, and 0 what is unlabelled,
    which is not counted. A class is called by the first of its names.
    """
    folder = find_ade20k(root) or root
    names = _class_names(folder / CLASSES)
    split = split or "validation"
    images = sorted((folder / "images" / split).glob("*.jpg"))
    if not images:
        raise UsageError(f"{folder / 'images' / split} holds no *.jpg; splits of ADE20K are "
                         "validation and training")  # fmt: skip
    masks = [folder / "annotations" / split / f"{image.stem}.png" for image in images]
    files = MaskFiles(images, masks, class_values(len(names), zero=IGNORED))
    return DenseDataset(name, names, DEFAULT_TEMPLATES, files)


def _class_names(file: Path) -> list[str]:
    """The last column, by the numbers in the first."""
    lines = [line.split("\t") for line in read_text(file, "ADE20K's table").splitlines()[1:]]
    names = [line[-1].split(",")[0].strip() for line in lines if line[0].strip()]
    numbers = [line[0].strip() for line in lines if line[0].strip()]
    if numbers != [str(n) for n in range(1, len(numbers) + 1)] or not all(names) or not names:
        raise UsageError(f"{file} is no table of classes 1, 2, ... with their names at the end")
    if len(names) > MOST_CLASSES:
        raise UsageError(f"{file}: {len(names)} classes; masks of 8 bits hold {MOST_CLASSES}")
    return names
