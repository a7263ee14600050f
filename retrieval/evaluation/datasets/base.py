"""An evaluation set: images with labels or captions, and the texts to classify them with."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from contrastive.distributed import rank, world_size
from data.config import OnError
from data.errors import UsageError
from data.images import decode_image
from data.pipeline.reader import ShardReader
from data.problems import BadSample
from data.shards.index import load_summaries
from data.shards.names import is_local
from data.transform import ImageTransform
from retrieval.evaluation.datasets.files import FileReader, ImageSource

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


@dataclass(frozen=True)
class EvalDataset:
    """Images, either in `shards` or as `images`, and what they are evaluated with.

    Without class names it serves for recall alone.
    """

    name: str
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    shards: Sequence[str] = ()
    images: ImageSource | None = None
    accepted: Sequence[tuple[int, ...]] = ()
    """Per image, the classes that are right for it, where that may be several (ReaL)."""
    captioned: bool = False
    """A retrieval set: recall is what it is for, and each of an image's captions is its own. (In
    other sets images that carry an equal caption share it.)"""
    left_out: int = 0
    """Images that are there, and that the set's protocol does not score."""

    def num_images(self) -> int:
        """Images of all ranks, good or bad; 0 where streamed shards do not say."""
        if self.images is not None:
            return len(self.images)
        if not all(map(is_local, self.shards)):
            return 0
        return sum(s.num_samples for s in load_summaries(self.shards))

    def reader(
        self,
        transform: ImageTransform,
        batch_size: int = 64,
        num_workers: int = 2,
        on_error: OnError = "skip",
        need_captions: bool = False,
    ) -> ShardReader | FileReader:
        """This rank's share, which yields `EvalBatch`: whole batches, which ranks take in turn."""
        share = rank(), world_size()
        if self.images is not None:
            return FileReader(self.images, transform, batch_size, num_workers, on_error, share)
        return ShardReader(
            self.shards,
            transform,
            batch_size=batch_size,
            num_workers=num_workers,
            need_captions=need_captions,
            caption_lines=self.captioned,
            share=share,
            on_error=on_error,
        )


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
