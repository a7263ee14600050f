"""The published layouts of pictures with masks and boxes, recognised by what a folder holds."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.class_names import CLASS_NAMES_FILE, TEMPLATES_FILE, read_class_names, read_templates
from data.dense import ade20k, coco, mask_folder, voc
from data.dense.dense_dataset import DenseDataset
from data.errors import UsageError


class Layout(NamedTuple):
    recognise: Callable[[Path], object]
    """Whether a folder holds it."""
    open: Callable[[Path, str, str], DenseDataset]
    """Of a folder, a split ("": the one to evaluate on) and a name."""
    holds: str


LAYOUTS: Mapping[str, Layout] = {
    "ade20k": Layout(
        ade20k.find_ade20k, ade20k.open_ade20k, "images/, annotations/ and objectInfo150.txt"
    ),
    "voc": Layout(voc.find_voc, voc.open_voc, "JPEGImages/, SegmentationClass/ and ImageSets/"),
    "coco": Layout(
        coco.has_instances, coco.open_instances, "annotations/instances_*.json and the images"
    ),
    "coco-panoptic": Layout(
        coco.has_panoptic, coco.open_panoptic, "annotations/panoptic_*.json and panoptic_*/"
    ),
    "coco-stuff": Layout(coco.has_stuff, coco.open_stuff, "stuffthingmaps/ and labels.txt"),
    "masks": Layout(
        mask_folder.is_mask_folder,
        mask_folder.open_mask_folder,
        f"images/, masks/ and {CLASS_NAMES_FILE}",
    ),
}


def load_dense(root: str | Path, kind: str = "", split: str = "", name: str = "") -> DenseDataset:
    """Open a set of pictures with masks or boxes.

    kind: one of `LAYOUTS`; "" recognises it. split: as the layout calls it; "" takes the one to
    evaluate on. name: for reports, "" takes the folder's. The files `classnames.txt` (a line for
    each class, in its order) and `zeroshot_classification_templates.txt` in `root` replace the
    set's own texts.
    Raises `UsageError` naming the path and what was expected there.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    if kind and kind not in LAYOUTS:
        raise UsageError(f"unknown data set {kind!r}; allowed: {', '.join(LAYOUTS)}")
    dataset = LAYOUTS[kind or _recognised(root)].open(root, split, name or root.resolve().name)
    if (root / TEMPLATES_FILE).is_file():
        dataset = replace(dataset, templates=read_templates(root / TEMPLATES_FILE))
    if (root / CLASS_NAMES_FILE).is_file():
        names, wanted = read_class_names(root / CLASS_NAMES_FILE), len(dataset.class_names)
        if len(names) != wanted:
            raise UsageError(
                f"{root / CLASS_NAMES_FILE} has {len(names)} names, for {wanted} classes"
            )
        dataset = replace(dataset, class_names=names)
    return dataset


def _recognised(root: Path) -> str:
    found = [kind for kind, layout in LAYOUTS.items() if layout.recognise(root)]
    if not found:
        expected = "; ".join(f"{kind} ({layout.holds})" for kind, layout in LAYOUTS.items())
        raise UsageError(f"{root} holds no set with masks or boxes; expected one of {expected}")
    if len(found) > 1:
        raise UsageError(f"{root} holds {' and '.join(found)}; say which, as in dataset={found[0]}")
    return found[0]
