"""Image files in folders: finding, checking, labelling and loading them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.errors import UsageError, check_utf8
from data.image_headers import IMAGE_EXTS, SYSTEM_FOLDERS, has_image_suffix
from data.images import decode_image
from data.problems import BadSample


@dataclass(frozen=True)
class ImageFiles:
    """Image files, with a label or captions (`texts`) each."""

    paths: Sequence[str]
    labels: Sequence[int] = ()
    texts: Sequence[tuple[str, ...]] = ()
    crop: Callable[[Image.Image], Image.Image] | None = None  # of each image once decoded

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
        return self.crop(image) if self.crop else image, label


# ---- folders ---------------------------------------------------------------------------------


def find_folder(root: Path, *names: str) -> Path:
    """The first of these folders that exists below `root`, or `root` itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def class_folders(root: Path) -> list[str]:
    """The folders below `root`, sorted, but for hidden ones and `SYSTEM_FOLDERS`. `UsageError`
    where there are none, and for a name that is not UTF-8."""
    found = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    own = [name for name in found if name.lower() not in SYSTEM_FOLDERS]
    folders = sorted(name for name in own if not name.startswith("."))
    if not folders:
        raise UsageError(f"{root} has no folders; expected one folder of images per class")
    check_utf8(*folders)
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
    found = [entry.name for entry in os.scandir(folder) if has_image_suffix(entry.name)]
    names = [name for name in found if not name.startswith(".")]  # as macOS leaves beside files
    if not names:
        raise UsageError(
            f"{folder} holds no images; expected files ending in {', '.join(sorted(IMAGE_EXTS))}"
        )
    return [os.path.join(folder, name) for name in sorted(names)]


def labelled_files(root: Path, folders: Sequence[str]) -> ImageFiles:
    """The images of these folders, labelled by their number in the list."""
    files = [(path, n) for n, folder in enumerate(folders) for path in list_images(root / folder)]
    paths, labels = zip(*files, strict=True)
    return ImageFiles(paths, labels)
