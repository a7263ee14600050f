"""The classification sets that torchvision reads from disk."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.class_names import DEFAULT_TEMPLATES
from data.errors import UsageError
from data.problems import BadSample
from retrieval.evaluation.datasets.eval_dataset import EvalDataset

PHOTOS = ("a photo of a {c}.", "a photo of the {c}.", "a blurry photo of a {c}.")
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class KnownSet:
    """A class of `torchvision.datasets` and the texts to classify its images with."""

    factory: str
    folder: str  # below the root, where torchvision looks
    templates: Sequence[str]
    class_names: Sequence[str] = ()  # () where torchvision knows them


SETS = {
    "caltech101": KnownSet("Caltech101", "caltech101", PHOTOS),
    "caltech256": KnownSet("Caltech256", "caltech256", PHOTOS),
    "cifar10": KnownSet("CIFAR10", "cifar-10-batches-py", PHOTOS),
    "cifar100": KnownSet("CIFAR100", "cifar-100-python", PHOTOS),
    "dtd": KnownSet("DTD", "dtd", ("a photo of a {c} texture.", "a photo of a {c} pattern.")),
    "eurosat": KnownSet(
        "EuroSAT", "eurosat", ("a satellite photo of {c}.",),
        (
            "annual crop land", "forest", "herbaceous vegetation", "a highway",
            "industrial buildings", "pasture land", "permanent crop land",
            "residential buildings", "a river", "a sea or lake",
        ),
    ),
    "fashion-mnist": KnownSet("FashionMNIST", "FashionMNIST", ("a photo of a {c}.",)),
    "fgvc-aircraft": KnownSet(
        "FGVCAircraft", "fgvc-aircraft-2013b", ("a photo of a {c}, a type of aircraft.",)
    ),
    "flowers102": KnownSet(
        "Flowers102", "flowers-102", ("a photo of a {c}, a type of flower.",)
    ),
    "food101": KnownSet("Food101", "food-101", ("a photo of {c}, a type of food.",)),
    "mnist": KnownSet("MNIST", "MNIST", ('a photo of the number "{c}".',), DIGITS),
    "pets": KnownSet("OxfordIIITPet", "oxford-iiit-pet", ("a photo of a {c}, a type of pet.",)),
    "places365": KnownSet("Places365", "", PHOTOS),
    "stanford-cars": KnownSet("StanfordCars", "stanford_cars", PHOTOS),
    "stl10": KnownSet("STL10", "stl10_binary", PHOTOS),
    "sun397": KnownSet("SUN397", "SUN397", PHOTOS),
    "svhn": KnownSet("SVHN", "", ('a photo of the number "{c}".',), DIGITS),
}  # fmt: skip


def open_torchvision(kind: str, root: Path, name: str) -> EvalDataset:
    """One of `SETS`, or torchvision:CLASS for any other that knows its class names.

    The split is the set's own test split, else its validation split, else all of it (Caltech,
    EuroSAT, SUN397).
    """
    known = SETS.get(kind) or KnownSet(kind.partition(":")[2], "", DEFAULT_TEMPLATES)
    if not (root / known.folder).is_dir():
        raise UsageError(
            f"{root} has no folder {known.folder}; expected the files as "
            f"torchvision.datasets.{known.factory} wants them"
        )
    dataset = _load(known.factory, root)
    names = known.class_names or getattr(dataset, "classes", getattr(dataset, "categories", ()))
    if not names:
        raise UsageError(
            f"torchvision.datasets.{known.factory} knows no class names; write the set as shards "
            "with classnames.txt"
        )
    return EvalDataset(
        name, [_clean(n) for n in names], known.templates, images=TorchvisionImages(dataset, name)
    )


def _load(factory: str, root: Path) -> Any:
    import torchvision

    found = getattr(torchvision.datasets, factory, None)
    if not inspect.isclass(found) or not issubclass(found, torchvision.datasets.VisionDataset):
        raise UsageError(f"torchvision.datasets has no data set {factory!r}")
    build: Any = found  # each has its own arguments
    parameters = inspect.signature(build).parameters
    try:
        if "split" not in parameters:
            return build(str(root), **({"train": False} if "train" in parameters else {}))
        try:
            return build(str(root), split="test")
        except ValueError as error:
            if "Valid values are" not in str(error):  # a damaged file, not a set without this split
                raise
            return build(str(root), split="val")
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).split(" You can use download")[0].rstrip(".")
        raise UsageError(
            f"{root} cannot be read by torchvision.datasets.{factory} ({reason}); expected its "
            "files as they are published, unpacked"
        ) from error


def _clean(name: Any) -> str:
    """`tench` for ("tench", "Tinca tinca"), `abbey` for /a/abbey, `church outdoor` for
    church/outdoor, `airplanes` for 251.airplanes-101; F-16A/B stays."""
    first = name if isinstance(name, str) else name[0]
    plain = re.sub(r"^/[a-z]/|^\d{3}\.|(?<=[a-z])-101$", "", first).replace("_", " ")
    return re.sub(r"(?<=[a-z])/(?=[a-z])", " ", plain).strip()


class TorchvisionImages:
    """The (image, label) pairs of a torchvision data set."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, row: int) -> str:
        return f"{self._name}, image {row}"

    def captions(self, row: int) -> tuple[str, ...]:
        return ()

    def load(self, row: int, max_pixels: int) -> tuple[Image.Image, int]:
        try:
            image, label = self._dataset[row]
            return image.convert("RGB"), int(label)
        except Exception as error:  # a broken header can raise nearly anything in Pillow's plugins
            raise BadSample("not_an_image", f"{type(error).__name__}: {error}") from None
