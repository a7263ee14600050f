"""Evaluation sets as they lie on disk: shards, class folders, ImageNet's validation tree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from contrastive.distributed import rank, world_size
from data.batch import EvalBatch
from data.classes import (
    CLASS_NAMES_FILE,
    SIMPLE_TEMPLATES,
    TEMPLATES_FILE,
    read_class_names,
    read_templates,
)
from data.errors import UsageError
from data.images import ImageTransform, decode_image
from data.problems import BadSample, add_counts
from data.reader import ShardReader
from data.samples import OnError
from data.shards import expand_shards, is_local, load_summaries

DatasetKind = Literal["shards", "folder", "imagenet"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class EvalDataset:
    """Labelled or captioned images, and the texts to classify them with.

    Either `shards` or `files` (path, label). Without class names it serves for recall alone.
    """

    name: str
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ()
    shards: Sequence[str] = ()
    files: Sequence[tuple[str, int]] = ()

    def num_images(self) -> int:
        """Images of all ranks, good or bad; 0 where streamed shards do not say."""
        if not all(map(is_local, self.shards)):
            return 0
        return len(self.files) + sum(s.num_samples for s in load_summaries(self.shards))

    def reader(
        self,
        transform: ImageTransform,
        batch_size: int = 64,
        num_workers: int = 2,
        on_error: OnError = "skip",
        need_captions: bool = False,
    ) -> "ShardReader | FileReader":
        """This rank's share, which yields `EvalBatch`. Ranks share files, or whole shards."""
        own = list(range(rank(), len(self.files or self.shards), world_size()))
        if self.files or not own:
            return FileReader(self.files, own, transform, batch_size, num_workers, on_error)
        return ShardReader(
            [self.shards[number] for number in own],
            transform,
            batch_size=batch_size,
            num_workers=num_workers,
            need_captions=need_captions,
            on_error=on_error,
        )


def load_dataset(kind: DatasetKind, root: str | Path, name: str = "") -> EvalDataset:
    """Open an evaluation set. Nothing is downloaded.

    shards: classnames.txt, zeroshot_classification_templates.txt and *.tar with KEY.cls
    (CLIP_benchmark's layout; the tars may lie in `test/`). folder: ROOT/<class name>/*.jpg.
    imagenet: ROOT/val/<wnid>/*.JPEG, or <wnid> right below ROOT; open_clip's names and templates.
    Raises `UsageError` naming the path and what was expected there.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; --root names the data set's folder")
    name = name or root.resolve().name
    if kind == "shards":
        return _open_shards(root, name)
    if kind == "folder":
        classes = _class_folders(root)
        files = _list_files(root, {folder: label for label, folder in enumerate(classes)})
        names = [folder.replace("_", " ") for folder in classes]
        return EvalDataset(name, names, SIMPLE_TEMPLATES, files=files)
    return _open_imagenet(root, name)


def _open_shards(root: Path, name: str) -> EvalDataset:
    for file in (CLASS_NAMES_FILE, TEMPLATES_FILE):
        if not (root / file).is_file():
            raise UsageError(
                f"{root} has no {file}; expected {CLASS_NAMES_FILE}, {TEMPLATES_FILE} and *.tar"
            )
    folder = root if any(root.glob("*.tar")) else root / "test"
    return EvalDataset(
        name,
        read_class_names(root / CLASS_NAMES_FILE),
        read_templates(root / TEMPLATES_FILE),
        shards=expand_shards([f"{folder}/*.tar"]),
    )


def _open_imagenet(root: Path, name: str) -> EvalDataset:
    import open_clip
    from timm.data import ImageNetInfo

    root = root / "val" if (root / "val").is_dir() else root
    wnids = ImageNetInfo("imagenet-1k").label_names()
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    for folder in _class_folders(root):
        if folder not in labels:
            raise UsageError(
                f"{root}/{folder} is not one of ImageNet's 1,000 classes; expected folders "
                f"named like {wnids[0]}"
            )
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    files = _list_files(root, labels)
    return EvalDataset(name, open_clip.IMAGENET_CLASSNAMES, templates, files=files)


def _class_folders(root: Path) -> list[str]:
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not folders:
        raise UsageError(f"{root} has no folders; expected one folder of images per class")
    return folders


def _list_files(root: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    """(path, label) of the images in the class folders that exist, sorted by folder and name."""
    files: list[tuple[str, int]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        own = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not own:
            raise UsageError(
                f"{folder} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        files += [(path, labels[folder.name]) for path in own]
    return files


class FileReader:
    """Image files in batches, in order. Iterate for `EvalBatch`; unreadable ones are counted.

    rows: which of `files` to read. Batches without any readable image are left out.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        rows: Sequence[int],
        transform: ImageTransform,
        batch_size: int,
        num_workers: int,
        on_error: OnError,
        max_pixels: int = 100_000_000,
    ) -> None:
        self.errors: dict[str, int] = {}
        self._on_error = on_error
        self._loader = DataLoader(
            _Files(files, rows, transform, max_pixels),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=list,
        )

    def __iter__(self) -> Iterator[EvalBatch]:
        for samples in self._loader:
            good = [s for s in samples if not isinstance(s, BadFile)]
            for bad in samples:
                if isinstance(bad, BadFile):
                    if self._on_error == "raise":
                        raise UsageError(f"{bad.path}: {bad.cause}")
                    add_counts(self.errors, {bad.kind: 1})
            if good:
                rows, paths, labels, images = zip(*good, strict=True)
                zeros = torch.zeros(len(good), dtype=torch.int64)
                yield EvalBatch(
                    keys=list(paths),
                    images=torch.stack(images),
                    captions=[()] * len(good),
                    labels=torch.tensor(labels),
                    shard=0,
                    indices=torch.tensor(rows),
                    offsets=zeros,
                    sizes=zeros,
                )


@dataclass(frozen=True)
class BadFile:
    """A file that is no readable image."""

    path: str
    kind: str
    cause: str


class _Files(Dataset):
    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        rows: Sequence[int],
        transform: ImageTransform,
        max_pixels: int,
    ) -> None:
        self.files, self.rows = files, rows
        self.transform, self.max_pixels = transform, max_pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, str, int, torch.Tensor] | BadFile:
        path, label = self.files[self.rows[number]]
        try:
            image = decode_image(Path(path).read_bytes(), self.max_pixels)
            return self.rows[number], path, label, self.transform(image)
        except BadSample as bad:
            return BadFile(path, bad.kind, bad.cause)
