"""Image files in folders: finding, checking, labelling and loading them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.errors import UsageError
from data.images import decode_image
from data.problems import BadSample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
RED = ((255, 255), (0, 0), (0, 0))  # lowest and highest value of each channel


@dataclass(frozen=True)
class ImageFiles:
    """Image files, with a label or captions (`texts`) each."""

    paths: Sequence[str]
    labels: Sequence[int] = ()
    texts: Sequence[tuple[str, ...]] = ()
    red_border: bool = False  # to be taken off (ObjectNet)

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, row: int) -> str:
        return self.paths[row]

    def captions(self, row: int) -> tuple[str, ...]:
        return self.texts[row] if self.texts else ()

    def load(self, row: int, max_pixels: int) -> tuple[Image.Image, int]:
        try:
            data = Path(self.paths[row]).read_bytes()
        except OSError as error:
            raise BadSample("unreadable", error.strerror or str(error)) from None
        image = decode_image(data, max_pixels)
        label = self.labels[row] if self.labels else -1
        return without_red_border(image) if self.red_border else image, label


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


# ---- folders ---------------------------------------------------------------------------------


def find_folder(root: Path, *names: str) -> Path:
    """The first of these folders that exists below `root`, or `root` itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def class_folders(root: Path) -> list[str]:
    """The folders below `root`, sorted, but for hidden ones. `UsageError` where there are none."""
    found = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    folders = sorted(name for name in found if not name.startswith("."))
    if not folders:
        raise UsageError(f"{root} has no folders; expected one folder of images per class")
    return folders


def check_folders(root: Path, wanted: Sequence[str], what: str) -> None:
    """Raise `UsageError` unless `root` has exactly the folders `wanted`."""
    found, known = class_folders(root), set(wanted)
    for folder in found:
        if folder not in known:
            raise UsageError(
                f"{root}/{folder} is not one of {what}'s {len(wanted):,} classes; expected "
                f"folders named like {wanted[0]}"
            )
    missing = sorted(known - set(found))
    if missing:
        raise UsageError(
            f"{root} lacks {len(missing):,} of {what}'s {len(wanted):,} class folders, "
            f"{missing[0]} among them; expected the whole set as it is published"
        )


def list_images(folder: Path) -> list[str]:
    """Paths of the images in a folder, sorted. Raises `UsageError` where there are none."""
    names = [e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES)]
    if not names:
        raise UsageError(
            f"{folder} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return [os.path.join(folder, name) for name in sorted(names)]


def labelled_files(root: Path, folders: Sequence[str]) -> ImageFiles:
    """The images of these folders, labelled by their number in the list."""
    files = [(path, n) for n, folder in enumerate(folders) for path in list_images(root / folder)]
    paths, labels = zip(*files, strict=True)
    return ImageFiles(paths, labels)
