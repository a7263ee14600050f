"""Pascal VOC's segmentation: 20 classes and the background."""

from pathlib import Path

from data.class_names import DEFAULT_TEMPLATES
from data.dense.dense_dataset import DenseDataset
from data.dense.mask_files import MaskFiles, class_values, read_text
from data.dense.picture import BACKGROUND
from data.errors import UsageError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa",
    "train", "tv monitor",
)  # fmt: skip
LISTS = "ImageSets/Segmentation"


def find_voc(root: Path) -> Path | None:
    """The set's folder: `root` or in it, of 2012 where there are several years."""
    for folder in (root, root / "VOC2012", root / "VOCdevkit/VOC2012"):
        if (folder / LISTS).is_dir() and (folder / "SegmentationClass").is_dir():
            return folder
    return None


def open_voc(root: Path, split: str, name: str) -> DenseDataset:
    """JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/SPLIT.txt.

    split: val (also ""), train or trainval. Masks have a palette: 0 is background, k the k-th
    class, 255 the edges, which are not counted.
    """
    folder = find_voc(root) or root
    file = folder / LISTS / f"{split or 'val'}.txt"
    stems = read_text(file, "the list of a split (train, val, trainval)").split()
    if not stems:
        raise UsageError(f"{file} lists no pictures")
    images = [folder / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    masks = [folder / "SegmentationClass" / f"{stem}.png" for stem in stems]
    files = MaskFiles(images, masks, class_values(len(CLASSES), zero=BACKGROUND))
    return DenseDataset(name, CLASSES, DEFAULT_TEMPLATES, files, background=True)
