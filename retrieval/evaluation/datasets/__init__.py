"""Evaluation sets as they are published, one module per layout. Nothing is downloaded or measured
here, and opening a set imports no torch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from data.class_names import DEFAULT_TEMPLATES
from data.dense.dense_dataset import DenseDataset
from data.errors import UsageError
from retrieval.evaluation.datasets import imagenet, karpathy, torchvision
from retrieval.evaluation.datasets.clip_benchmark import open_shards
from retrieval.evaluation.datasets.eval_dataset import EvalDataset
from retrieval.evaluation.datasets.image_folders import class_folders, labelled_files
from retrieval.evaluation.datasets.objectnet import open_objectnet

__all__ = ["DATASETS", "EvalDataset", "load_dataset", "load_named", "tell_apart"]

AnySet = TypeVar("AnySet", EvalDataset, DenseDataset)
Opener = Callable[[str, Path, str], EvalDataset]


def _open_folder(kind: str, root: Path, name: str) -> EvalDataset:
    """ROOT/<class name>/*.jpg."""
    folders = class_folders(root)
    names = [folder.replace("_", " ") for folder in folders]
    return EvalDataset(name, names, DEFAULT_TEMPLATES, images=labelled_files(root, folders))


DATASETS: Mapping[str, Opener] = {
    "shards": open_shards,
    "folder": _open_folder,
    **dict.fromkeys(imagenet.FOLDERS, imagenet.open_imagenet),
    "objectnet": lambda kind, root, name: open_objectnet(root, name),
    **dict.fromkeys(torchvision.SETS, torchvision.open_torchvision),
    **dict.fromkeys(karpathy.FOLDERS, karpathy.open_karpathy),
}
"""What `--dataset` may name; besides, torchvision:CLASS."""
UNNAMED = ("shards", "folder")  # layouts that any set may have


def load_dataset(kind: str, root: str | Path, name: str = "") -> EvalDataset:
    """Open an evaluation set: one of `DATASETS`, or torchvision:CLASS.

    name: for the report; where none is given, `kind`, or the folder's name for shards and folder.
    Raises `UsageError` naming the path and what was expected there.
    """
    opener = torchvision.open_torchvision if kind.startswith("torchvision:") else DATASETS.get(kind)
    if opener is None:
        raise UsageError(
            f"unknown data set {kind!r}; allowed: {', '.join(DATASETS)}, torchvision:CLASS"
        )
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; expected that of the data set {kind}")
    return opener(kind, root, name or (root.resolve().name if kind in UNNAMED else kind))


def load_named(text: str) -> EvalDataset:
    """Open NAME:ROOT, or the shards in a folder where there is no NAME."""
    kind, colon, root = text.rpartition(":")
    if not colon:
        return load_dataset("shards", text)
    return load_dataset(kind, root)


def tell_apart(datasets: Sequence[AnySet], roots: Sequence[str]) -> list[AnySet]:
    """The sets under distinct names: equal ones are prefixed with the folder above each root.

    Raises `UsageError` if two are still equal.
    """
    count = Counter(dataset.name for dataset in datasets)
    told = [
        replace(dataset, name=f"{Path(root).resolve().parent.name}/{dataset.name}")
        if count[dataset.name] > 1
        else dataset
        for dataset, root in zip(datasets, roots, strict=True)
    ]
    (name, often), *_ = Counter(dataset.name for dataset in told).most_common(1) or [("", 0)]
    if often > 1:
        raise UsageError(
            f"{often} data sets are called {name}; their folders need names that differ"
        )
    return told
