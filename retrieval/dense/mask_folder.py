"""Folders of pictures with masks, and how well a segmenter does on one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.class_names import (
    CLASS_NAMES_FILE,
    DEFAULT_TEMPLATES,
    TEMPLATES_FILE,
    read_class_names,
    read_templates,
)
from data.errors import UsageError
from data.given import as_rgb
from data.progress import Progress
from retrieval.dense.miou import IGNORED, IoUCounter, MeanIoU
from retrieval.dense.segment import ZeroShotSegmenter

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class MaskFolder:
    """`images/NAME.png|jpg|webp`, `masks/NAME.png` of 8 bits, `classnames.txt`, templates.

    A mask's values: 0 is background, k the k-th line of `classnames.txt`, 255 is not counted. As
    `python -m data.scenes` writes it. Where 0 means unlabelled in a set, as in ADE20K, write 255.
    A mask is of the picture as shown, turned by its EXIF tag, not of the pixels as stored.
    """

    root: Path
    class_names: list[str]
    templates: list[str]
    files: list[Path]
    skipped: Counter[str] = field(default_factory=Counter)
    """How many pictures the last pass left out, by the reason: no_mask, unreadable, mask_size (it
    is of another size than its picture), mask_labels (outside the list)."""

    @classmethod
    def open(cls, root: str | Path) -> "MaskFolder":
        """Raises `UsageError` for a folder without pictures or class names."""
        root = Path(root)
        names = read_class_names(root / CLASS_NAMES_FILE)
        if len(names) >= IGNORED:
            raise UsageError(f"{root}: {len(names)} classes; masks of 8 bits hold {IGNORED - 1}")
        templates = list(DEFAULT_TEMPLATES)
        if (root / TEMPLATES_FILE).exists():
            templates = read_templates(root / TEMPLATES_FILE)
        images = root / "images"
        files = sorted(f for f in images.glob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise UsageError(f"{images} has no pictures ({', '.join(SUFFIXES)})")
        return cls(root, names, templates, files)

    def __iter__(self) -> Iterator[tuple[Image.Image, UInt8[np.ndarray, "h w"]]]:
        """Each picture and its mask; what is wrong with the others is counted, never guessed."""
        self.skipped.clear()
        for file in self.files:
            mask_file = self.root / "masks" / f"{file.stem}.png"
            if not mask_file.exists():
                self.skipped["no_mask"] += 1
                continue
            try:
                picture = as_rgb(file)
                with Image.open(mask_file, formats=("PNG",)) as opened:
                    if opened.mode not in ("L", "P"):
                        raise ValueError(f"a mask of mode {opened.mode}")
                    mask = np.asarray(opened)
            except (UsageError, OSError, ValueError, Image.DecompressionBombError):
                self.skipped["unreadable"] += 1
                continue
            if mask.shape != (picture.height, picture.width):
                self.skipped["mask_size"] += 1
            elif mask[mask != IGNORED].max(initial=0) > len(self.class_names):
                self.skipped["mask_labels"] += 1
            else:
                yield picture, mask


@dataclass(frozen=True)
class SegmentationReport:
    iou: MeanIoU
    num_pictures: int
    skipped: Mapping[str, int]


def evaluate_masks(
    segmenter: ZeroShotSegmenter,
    folder: MaskFolder,
    patch_size: int | None = None,
    *,
    shorter_side: int | None = None,
) -> SegmentationReport:
    """Mean IoU over all pictures of a folder; the segmenter has its class names.

    patch_size, shorter_side: as `ZeroShotSegmenter.similarities` takes them.
    Raises `UsageError` where the class names differ, or no picture could be used.
    """
    if segmenter.class_names != folder.class_names:
        raise UsageError(f"the segmenter's class names are not those of {folder.root}")
    counter, number = IoUCounter(len(folder.class_names)), 0
    progress = Progress(folder, "segmenting", len(folder.files), unit=" pictures", delay=5)
    for picture, mask in progress:
        found = segmenter.predict(picture, patch_size, shorter_side=shorter_side)[0]
        counter.add(mask, found)
        number += 1
    if not number:
        raise UsageError(f"{folder.root}: no picture could be used ({dict(folder.skipped)})")
    return SegmentationReport(counter.result(), number, dict(folder.skipped))
