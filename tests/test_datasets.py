"""Evaluation sets on disk: right labels, bad files counted, wrong layouts refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrastive.model.lit import LitModel
from data.errors import DataError, UsageError
from retrieval.evaluation.datasets import load_dataset, tell_apart
from retrieval.evaluation.datasets.image_folders import list_images


def make_tree(root: Path, folders: list[str], per_class: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.JPEG")
    return root


def test_class_folders_are_named_and_labelled_by_their_sorted_names(
    tmp_path: Path, tiny_model: LitModel
) -> None:
    root = make_tree(
        tmp_path / "pets", ["red_fox", "cat", ".ipynb_checkpoints", "@eaDir", "__MACOSX"]
    )
    dataset = load_dataset("folder", root)
    assert dataset.name == "pets"
    assert dataset.class_names == ["cat", "red fox"]
    (batch,) = dataset.reader(tiny_model.transform, num_workers=0)
    assert batch.labels.tolist() == [0, 0, 1, 1]
    assert [Path(key).parent.name for key in batch.keys] == ["cat"] * 2 + ["red_fox"] * 2
    assert batch.images is not None
    assert batch.images.shape == (4, 3, tiny_model.image_size, tiny_model.image_size)


def test_a_class_folder_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "pets", ["cat"])
    os.mkdir(os.fsencode(tmp_path / "pets") + b"/caf\xe9")
    with pytest.raises(UsageError, match=r"'caf\\udce9' is not UTF-8"):
        load_dataset("folder", tmp_path / "pets")


def test_sets_of_one_name_are_told_apart_by_the_folder_above(tmp_path: Path) -> None:
    roots = [str(make_tree(tmp_path / name, ["cat"])) for name in ("a/val", "b/val", "b/test")]
    datasets = [load_dataset("folder", root) for root in roots]
    assert [dataset.name for dataset in tell_apart(datasets, roots)] == ["a/val", "b/val", "test"]
    with pytest.raises(UsageError, match="2 data sets are called a/val"):
        tell_apart([datasets[0]] * 2, roots[:1] * 2)
    assert tell_apart([], []) == []


def test_every_suffix_of_images_counts_but_no_file_that_macos_leaves(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "set", ["cat"])
    for name in ("3.jfif", "4.JPE", "._1.png"):
        (root / "cat" / name).write_bytes(b"")
    names = [Path(file).name for file in list_images(root / "cat")]
    assert [name for name in names if name[0] in ".34"] == ["3.jfif", "4.JPE"]


def test_unreadable_files_are_counted_or_named(tmp_path: Path, tiny_model: LitModel) -> None:
    root = make_tree(tmp_path / "set", ["cat", "dog"])
    (root / "cat" / "1.JPEG").write_bytes(b"no picture")
    dataset = load_dataset("folder", root)
    reader = dataset.reader(tiny_model.transform, batch_size=1, num_workers=0)
    assert [batch.labels.tolist() for batch in reader] == [[0], [1], [1]]
    assert reader.errors == {"not_an_image": 1}
    with pytest.raises(DataError, match=r"cat/1\.JPEG"):
        list(dataset.reader(tiny_model.transform, num_workers=0, on_error="raise"))


@pytest.mark.parametrize(
    "layout", ["missing", "no folders", "empty class", "not imagenet", "part of imagenet"]
)
def test_wrong_layouts_name_the_path_and_what_was_expected(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    if layout == "missing":
        kind, message = "folder", "is not a folder"
    elif layout == "no folders":
        root.mkdir()
        kind, message = "folder", "one folder of images per class"
    elif layout == "empty class":
        make_tree(root, ["cat"])
        (root / "dog").mkdir()
        kind, message = "folder", "dog holds no images"
    elif layout == "part of imagenet":
        make_tree(root, ["n02124075", "n01440764"])
        kind, message = "imagenet", "lacks 998 of ImageNet's 1,000 class folders"
    else:
        make_tree(root, ["cat"])
        kind, message = "imagenet", "cat is not one of ImageNet's"
    with pytest.raises(UsageError, match=message):
        load_dataset(kind, root)


def test_shards_without_class_names_are_refused(emoji_shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(emoji_shards / "heldout_style", tmp_path / "copy")
    assert load_dataset("shards", copy).num_images() > 0
    (copy / "classnames.txt").unlink()
    with pytest.raises(UsageError, match=r"has no classnames\.txt"):
        load_dataset("shards", copy)


def test_caltech_256s_numbers_are_no_part_of_its_class_names(tmp_path: Path) -> None:
    folders = ["001.ak47", "003.backpack", "251.airplanes-101", "257.clutter"]
    make_tree(tmp_path / "caltech256/256_ObjectCategories", folders)
    dataset = load_dataset("caltech256", tmp_path)
    assert dataset.class_names == ["ak47", "backpack", "airplanes", "clutter"]
