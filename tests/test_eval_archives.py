"""ImageNet's sets, ObjectNet and torchvision's, in small trees laid out as they are published."""

import json
import pickle
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat
from shard_maker import TRANSFORM, png
from timm.data import ImageNetInfo
from torchvision.datasets.utils import verify_str_arg
from tree_maker import write_tree

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.evaluation.datasets import EvalDataset, load_dataset
from retrieval.evaluation.datasets.objectnet import without_red_border
from retrieval.evaluation.evaluate import evaluate

WNIDS = ImageNetInfo("imagenet-1k").label_names()


def labels(dataset: EvalDataset) -> list[int]:
    batches = dataset.reader(TRANSFORM, num_workers=0)
    return [label for batch in batches for label in batch.labels.tolist()]


# ---- ImageNet --------------------------------------------------------------------------------


def val_files() -> list[str]:
    """An image in each of the thousand folders; its number is 1,000 less its class."""
    return [f"{wnid}/ILSVRC2012_val_{1000 - n:08d}.JPEG" for n, wnid in enumerate(WNIDS)]


def test_imagenet_folders_get_imagenets_labels_and_names(tmp_path: Path) -> None:
    write_tree(tmp_path / "val", val_files())
    dataset = load_dataset("imagenet", tmp_path)
    assert labels(dataset) == list(range(1000))
    assert dataset.class_names == open_clip.IMAGENET_CLASSNAMES
    assert dataset.class_names[285] == "Egyptian Mau"
    assert len(dataset.templates) == 80
    assert labels(load_dataset("imagenet-sketch", tmp_path / "val")) == list(range(1000))


def write_devkit(root: Path, classes: list[int]) -> None:
    """classes: of each image, 0 to 999. The kit numbers classes in an order of its own."""
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    rows = [(number + 1, wnid) for number, wnid in enumerate(reversed(WNIDS))]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "u2"), ("WNID", "U9")])
    savemat(kit / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{1000 - label}\n" for label in classes)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def test_flat_imagenet_takes_its_labels_from_the_development_kit(tmp_path: Path) -> None:
    write_tree(tmp_path / "ILSVRC2012_img_val", [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 4)])
    with pytest.raises(UsageError, match=r"ground_truth\.txt is missing: expected the develop"):
        load_dataset("imagenet", tmp_path)
    write_devkit(tmp_path, [285, 0, 7, 999])
    assert labels(load_dataset("imagenet", tmp_path)) == [285, 0, 999]
    (tmp_path / "ILSVRC2012_img_val/ILSVRC2012_val_00000005.JPEG").write_bytes(png(0))
    with pytest.raises(UsageError, match="a line for each image"):
        load_dataset("imagenet", tmp_path)
    meta = tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat"
    for damaged in (b"", b"garbage" * 100, bytes(500)):
        meta.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"meta\.mat holds no table of classes"):
            load_dataset("imagenet", tmp_path)
    savemat(meta, {"synsets": np.zeros(3)})
    with pytest.raises(UsageError, match=r"meta\.mat holds no table of classes"):
        load_dataset("imagenet", tmp_path)


def test_imagenet_v2_folders_are_the_class_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    write_tree(folder, [f"{n}/{n:04d}.jpeg" for n in range(1000)])
    dataset = load_dataset("imagenet-v2", tmp_path)
    assert labels(dataset) == list(range(1000))
    assert dataset.class_names == open_clip.IMAGENET_CLASSNAMES


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [("imagenet-a", "stingray", "acorn"), ("imagenet-r", "goldfish", "acorn")],
)
def test_a_and_r_choose_among_their_own_200_classes(
    kind: str, first: str, last: str, tmp_path: Path
) -> None:
    own = (files("timm.data") / f"_info/{kind.replace('-', '_')}_synsets.txt").read_text().split()
    write_tree(tmp_path / kind, [*(f"{wnid}/x.jpg" for wnid in own)])
    (tmp_path / kind / "README.txt").write_text("as published")
    dataset = load_dataset(kind, tmp_path)
    assert len(dataset.class_names) == 200
    assert labels(dataset) == list(range(200))
    assert (dataset.class_names[0], dataset.class_names[-1]) == (first, last)
    names = dict(zip(WNIDS, open_clip.IMAGENET_CLASSNAMES, strict=True))
    assert dataset.class_names == [names[wnid] for wnid in own]


def test_real_accepts_any_of_an_images_labels(tmp_path: Path, tiny_model: LitModel) -> None:
    write_tree(tmp_path / "val", val_files())
    real: list[list[int]] = [[] for _ in range(1000)]
    every = list(range(1000))
    real[999 - 3], real[999 - 5], real[999 - 8] = every, [5, 6], every
    (tmp_path / "real.json").write_text(json.dumps(real))
    dataset = load_dataset("imagenet-real", tmp_path)
    assert dataset.num_images() == 3
    assert dataset.left_out == 997
    assert list(dataset.accepted) == [tuple(every), (5, 6), tuple(every)]
    one_template = EvalDataset(
        "real",
        dataset.class_names,
        ["{c}"],
        images=dataset.images,
        accepted=dataset.accepted,
        left_out=997,
    )
    result = evaluate(tiny_model, one_template, [48], num_workers=0)
    assert result.accuracy[48][1].value in (2 / 3, 1.0)
    assert not result.class_recall
    (tmp_path / "real.json").unlink()  # timm's copy of the published labels
    dataset = load_dataset("imagenet-real", tmp_path)
    assert 0 < dataset.left_out < 100  # of these thousand
    assert dataset.num_images() + dataset.left_out == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0.5]]", "has a label that is not a whole number from 0 to 999"),
        ('[["3"]]', "has a label that is not a whole number from 0 to 999"),
        ('{"a": [1]}', "is no list of lists of labels"),
        ("[1, 2]", "is no list of lists of labels"),
        ("[[3]]", "val_00000000.JPEG is not named like ILSVRC2012_val_00000001"),
    ],
)
def test_damaged_reassessed_labels_are_refused(text: str, message: str, tmp_path: Path) -> None:
    write_tree(tmp_path / "val", ["ILSVRC2012_val_00000000.JPEG"])
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_dataset("imagenet-real", tmp_path)


# ---- ObjectNet -------------------------------------------------------------------------------


def write_objectnet(root: Path) -> Path:
    """313 folders, of which 113 are ImageNet's too, with the mapping files between them."""
    mappings = root / "mappings"
    mappings.mkdir(parents=True)
    folders = {f"folder_{n:03d}": f"Thing {n}" for n in range(313)}
    lines = [f"name {n}, synonym" for n in range(1000)]
    covered = {f"Thing {n}": lines[2 * n] for n in range(0, 2 * 113, 2)}
    covered["Thing 4"] = f"{lines[8]}; {lines[9]}"
    jsons = {
        "folder_to_objectnet_label.json": folders,
        "objectnet_to_imagenet_1k.json": covered,
        "pytorch_to_imagenet_2012_id.json": {str(n): 999 - n for n in range(1000)},
    }
    for name, values in jsons.items():
        (mappings / name).write_text(json.dumps(values))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    pictures = [f"{folder}/{i}.png" for n, folder in enumerate(folders) for i in range(1 + n % 3)]
    write_tree(root / "images", pictures)
    return root


def test_objectnet_scores_113_classes_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write_objectnet(tmp_path / "objectnet-1.0")
    dataset = load_dataset("objectnet", tmp_path)
    per_folder = [1 + n % 3 for n in range(313)]
    scored = per_folder[0 : 2 * 113 : 2]
    assert dataset.class_names == [f"thing {n}" for n in range(0, 226, 2)]
    assert len(dataset.class_names) == len(scored) == 113
    assert dataset.num_images() == sum(scored)
    assert dataset.left_out == sum(per_folder) - sum(scored)
    assert labels(dataset) == [n for n, count in enumerate(scored) for _ in range(count)]
    assert load_dataset("objectnet", tmp_path / "objectnet-1.0").num_images() == sum(scored)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mapping", r"folder_to_objectnet_label\.json cannot be read: No such file"),
        ("not json", r"objectnet_to_imagenet_1k\.json is not JSON"),
        ("name", r"'Thing 2' covers 'no such name', which is no line of"),
        ("class folder", r"images has no folder folder_004; expected the 113"),
        ("labels", r"folder_to_objectnet_label\.json names 2 folders for 'Thing 0' of"),
        ("empty", r"objectnet_to_imagenet_1k\.json is no JSON object of names"),
        ("list", r"objectnet_to_imagenet_1k\.json is no JSON object of names"),
        ("numbers", r"pytorch_to_imagenet_2012_id\.json is not from numbers to numbers"),
        ("bytes", r"imagenet_to_label_2012_v2 cannot be read: 'utf-8' codec"),
        ("stranger", r"images/cats is not in folder_to_objectnet_label\.json"),
        ("images", r"has no folder images; expected images and mappings"),
    ],
)
def test_damaged_objectnet_is_refused_with_the_path(
    damage: str, message: str, tmp_path: Path
) -> None:
    root = write_objectnet(tmp_path)
    mappings, images = root / "mappings", root / "images"
    overlap = mappings / "objectnet_to_imagenet_1k.json"
    if damage == "mapping":
        (mappings / "folder_to_objectnet_label.json").unlink()
    elif damage == "not json":
        overlap.write_text("{")
    elif damage == "name":
        overlap.write_text(json.dumps({"Thing 2": "no such name"}))
    elif damage == "labels":
        file = mappings / "folder_to_objectnet_label.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"folder_001": "Thing 0"}))
    elif damage in ("empty", "list"):
        overlap.write_text(json.dumps({} if damage == "empty" else {"Thing 2": ["name 4"]}))
    elif damage == "numbers":
        (mappings / "pytorch_to_imagenet_2012_id.json").write_text('{"zero": 0}')
    elif damage == "bytes":
        (mappings / "imagenet_to_label_2012_v2").write_bytes(b"\xff")
    elif damage == "class folder":
        (images / "folder_004").rename(root / "elsewhere")
    elif damage == "stranger":
        (images / "cats").mkdir()
        (images / "cats/1.png").write_bytes(png(0))
    else:
        images.rename(root / "pictures")
    with pytest.raises(UsageError, match=message):
        load_dataset("objectnet", root)


@pytest.mark.parametrize("width", [0, 1, 2, 3])
def test_the_red_border_alone_is_taken_off(width: int) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[...] = (255, 0, 0)
    inside = np.random.default_rng(0).integers(0, 255, (20 - 2 * width, 30 - 2 * width, 3))
    pixels[width : 20 - width, width : 30 - width] = inside
    left = np.asarray(without_red_border(Image.fromarray(pixels)))
    off = min(width, 2)  # two pixels at most
    np.testing.assert_array_equal(left, pixels[off : 20 - off, off : 30 - off])


# ---- torchvision -----------------------------------------------------------------------------


def test_cifar10_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    contents = {
        "test_batch": {"data": pixels, "labels": [n % 10 for n in range(12)]},
        "batches.meta": {"label_names": [*names, "truck"]},
    }
    for file, values in contents.items():
        (folder / file).write_bytes(pickle.dumps(values))
    with pytest.raises(UsageError, match=r"CIFAR10 \(Dataset not found or corrupted"):
        load_dataset("cifar10", tmp_path)  # torchvision unpickles the published files alone
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": None})
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.class_names == [*names, "truck"]
    assert labels(dataset) == [*range(10), 0, 1]
    (batch,) = dataset.reader(TRANSFORM, num_workers=0)
    first = TRANSFORM.square(Image.fromarray(pixels[0].reshape(3, 32, 32).transpose(1, 2, 0)))
    np.testing.assert_array_equal(batch.images[0], first)
    assert batch.keys[0] == "cifar10, image 0"


def write_pets(root: Path) -> None:
    pets = ["Abyssinian", "great_pyrenees"]
    base = root / "oxford-iiit-pet"
    write_tree(base / "images", [f"{pet}_{n}.jpg" for pet in pets for n in (1, 2)])
    (base / "annotations").mkdir()
    lines = [f"{pet}_{n} {i} 1 1" for i, pet in enumerate(pets, 1) for n in (1, 2)]
    (base / "annotations/test.txt").write_text("\n".join(lines) + "\n")


def test_pets_test_split_with_plain_names(tmp_path: Path, tiny_model: LitModel) -> None:
    write_pets(tmp_path)
    broken = tmp_path / "oxford-iiit-pet/images/great_pyrenees_1.jpg"
    broken.unlink()
    broken.write_bytes(b"no picture")
    dataset = load_dataset("pets", tmp_path)
    assert dataset.class_names == ["Abyssinian", "Great Pyrenees"]
    result = evaluate(tiny_model, dataset, [48], num_workers=0)
    assert result.num_images == 3
    assert result.errors == {"not_an_image": 1}
    assert result.figures()["pets/not_read"] == 1.0


def test_a_damaged_list_is_no_missing_split(tmp_path: Path) -> None:
    write_pets(tmp_path)
    (tmp_path / "oxford-iiit-pet/annotations/test.txt").write_text("nonsense\n")
    with pytest.raises(UsageError, match=r"OxfordIIITPet \(not enough values to unpack"):
        load_dataset("pets", tmp_path)
    (tmp_path / "food-101/meta").mkdir(parents=True)
    (tmp_path / "food-101/images").mkdir()
    (tmp_path / "food-101/meta/test.json").write_text("[]")
    with pytest.raises(UsageError, match=r"cannot be read by torchvision\.datasets\.Food101"):
        load_dataset("food101", tmp_path)


def test_a_set_without_a_test_split_is_read_by_its_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Valued(torchvision.datasets.FakeData):
        def __init__(self, root: str, split: str) -> None:
            verify_str_arg(split, "split", ("train", "val"))
            super().__init__(2, (3, 8, 8))
            self.classes = [split]

    monkeypatch.setattr(torchvision.datasets, "Valued", Valued, raising=False)
    assert load_dataset("torchvision:Valued", tmp_path).class_names == ["val"]


def test_any_other_class_of_torchvision_by_its_name(tmp_path: Path) -> None:
    write_pets(tmp_path)
    dataset = load_dataset("torchvision:OxfordIIITPet", tmp_path)
    assert labels(dataset) == [0, 0, 1, 1]
    with pytest.raises(UsageError, match=r"torchvision\.datasets has no data set 'Pets'"):
        load_dataset("torchvision:Pets", tmp_path)
    with pytest.raises(UsageError, match="no folder food-101; expected the files as torchvision"):
        load_dataset("food101", tmp_path)
