"""ImageNet's validation images, and the sets that test its classes elsewhere.

Class names and prompt templates are open_clip's (80 templates).
"""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from data.errors import UsageError
from retrieval.evaluation.datasets.eval_dataset import EvalDataset
from retrieval.evaluation.datasets.image_folders import (
    ImageFiles,
    check_folders,
    class_folders,
    find_folder,
    labelled_files,
    list_images,
)

VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
DEVKIT = "ILSVRC2012_devkit_t12/data"
# Where the images of each archive lie below the root, unless the root holds them.
FOLDERS = {
    "imagenet": ("val", "ILSVRC2012_img_val"),
    "imagenet-v2": (
        "imagenetv2-matched-frequency-format-val",
        "ImageNetV2-matched-frequency",
    ),
    "imagenet-a": ("imagenet-a",),
    "imagenet-r": ("imagenet-r",),
    "imagenet-sketch": ("sketch", "imagenet-sketch"),
    "imagenet-real": ("val", "ILSVRC2012_img_val"),
}


def open_imagenet(kind: str, root: Path, name: str) -> EvalDataset:
    """One of `FOLDERS`.

    imagenet: val/<wnid>/*.JPEG, or the flat ILSVRC2012_val_*.JPEG with the development kit.
    imagenet-v2: folders 0 to 999. imagenet-a and -r: 200 of the classes, the only candidates
    (arXiv:1907.07174, arXiv:2006.16241). imagenet-real: imagenet's images with the labels of
    arXiv:2006.07159 in ROOT/real.json, else timm's copy of it; an image counts as right where the
    prediction is among its labels, and images without labels are left out.
    """
    folder = find_folder(root, *FOLDERS[kind])
    if kind == "imagenet-real":
        return _open_real(root, folder, name)
    if kind == "imagenet" and _is_flat(folder):
        return _dataset(name, _flat_files(root, folder))
    wnids = _timm_list("imagenet_synsets.txt")
    if kind == "imagenet-v2":
        numbers = [str(number) for number in range(1000)]
        check_folders(folder, numbers, "ImageNet-V2")
        return _dataset(name, labelled_files(folder, numbers))
    if kind in ("imagenet-a", "imagenet-r"):
        short = _timm_list(f"{kind.replace('-', '_')}_synsets.txt")
        check_folders(folder, short, f"ImageNet-{kind[-1].upper()}")
        return _dataset(name, labelled_files(folder, short), [wnids.index(w) for w in short])
    check_folders(folder, wnids, "ImageNet")
    return _dataset(name, labelled_files(folder, wnids))


def imagenet_templates() -> list[str]:
    """CLIP's 80 prompt templates for ImageNet, with `{c}`."""
    import open_clip

    return [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def _dataset(
    name: str, images: ImageFiles, candidates: Sequence[int] = (), **more: Any
) -> EvalDataset:
    import open_clip

    names = open_clip.IMAGENET_CLASSNAMES
    names = [names[label] for label in candidates] if candidates else names
    return EvalDataset(name, names, imagenet_templates(), images=images, **more)


def _timm_list(file: str) -> list[str]:
    return (files("timm.data") / "_info" / file).read_text().split()


# ---- files named by their number -------------------------------------------------------------


def _is_flat(folder: Path) -> bool:
    return any(VAL_FILE.fullmatch(path.name) for path in folder.glob("ILSVRC2012_val_*"))


def _numbers(paths: Sequence[str]) -> list[int]:
    """0 for ILSVRC2012_val_00000001.JPEG, and so on."""
    numbers = []
    for path in paths:
        match = VAL_FILE.fullmatch(Path(path).name)
        if not match or not int(match[1]):
            raise UsageError(f"{path} is not named like ILSVRC2012_val_00000001.JPEG")
        numbers.append(int(match[1]) - 1)
    return numbers


def _flat_files(root: Path, folder: Path) -> ImageFiles:
    """Labels from the development kit: its numbers of classes, and which WordNet id is which."""
    kit = root / DEVKIT
    truth, meta = kit / "ILSVRC2012_validation_ground_truth.txt", kit / "meta.mat"
    for file in (truth, meta):
        if not file.is_file():
            raise UsageError(
                f"{file} is missing: expected the development kit (ILSVRC2012_devkit_t12.tar.gz) "
                f"unpacked in {root}, or the images in one folder per WordNet id"
            )
    from scipy.io import loadmat

    order = _timm_list("imagenet_synsets.txt")
    paths = list_images(folder)
    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{meta} holds no table of classes: {error!r}") from error
    try:
        ids = [int(line) for line in truth.read_text().split()]
        labels = [order.index(wnids[ids[number]]) for number in _numbers(paths)]
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{kit} does not fit the images of {folder}: {error!r}; expected class numbers 1 to "
            "1000, a line for each image"
        ) from error
    return ImageFiles(paths, labels)


def _open_real(root: Path, folder: Path, name: str) -> EvalDataset:
    file = root / "real.json"
    source = file if file.is_file() else files("timm.data") / "_info" / "imagenet_real_labels.json"
    try:
        labels = json.loads(source.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is no list of lists of labels: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(own, list) for own in labels):
        raise UsageError(f"{file} is no list of lists of labels")
    if not all(type(label) is int and 0 <= label < 1000 for own in labels for label in own):
        raise UsageError(f"{file} has a label that is not a whole number from 0 to 999")
    if _is_flat(folder):
        paths = list_images(folder)
    else:
        paths = [path for wnid in class_folders(folder) for path in list_images(folder / wnid)]
    numbers = _numbers(paths)
    if max(numbers) >= len(labels):
        raise UsageError(
            f"{file} has labels for {len(labels):,} images; expected one list for each, "
            f"{max(numbers) + 1:,} or more"
        )
    scored = [(p, tuple(labels[n])) for p, n in zip(paths, numbers, strict=True) if labels[n]]
    if not scored:
        raise UsageError(f"{file} has no label for any image of {folder}")
    kept, accepted = zip(*scored, strict=True)
    images = ImageFiles(kept, [own[0] for own in accepted])
    return _dataset(name, images, accepted=accepted, left_out=len(paths) - len(kept))
