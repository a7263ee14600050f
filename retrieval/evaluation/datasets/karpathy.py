"""Flickr30k and COCO with Karpathy's splits: five captions for each image, a thousand and five
thousand test images."""

import json
from pathlib import Path

from data.errors import UsageError
from retrieval.evaluation.datasets.eval_dataset import EvalDataset
from retrieval.evaluation.datasets.image_folders import ImageFiles

# Where the images lie below the root; COCO's annotations say it themselves (val2014).
FOLDERS = {
    "flickr30k": ("flickr30k-images", "flickr30k_images", "Images", "images", "."),
    "coco": (".", "images"),
}


def open_karpathy(kind: str, root: Path, name: str) -> EvalDataset:
    """ROOT/dataset_flickr30k.json or ROOT/dataset_coco.json (the test split) and the images."""
    file = root / f"dataset_{kind}.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["images"]
        found = [
            (
                Path(entry.get("filepath", "")) / entry["filename"],
                tuple(sentence["raw"].strip() for sentence in entry["sentences"]),
            )
            for entry in entries
            if entry["split"] == "test"
        ]
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read: {error.strerror}; expected Karpathy's splits there"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is not Karpathy's file of splits ({error!r}); expected `images`, each with "
            "filename, split and sentences"
        ) from None
    if not found:
        raise UsageError(f"{file} has no image of the split test")
    for path, captions in found:
        if not captions or "" in captions:
            raise UsageError(f"{file}: {path} has no caption, or an empty one")
    first = found[0][0]
    folders = [root / folder for folder in FOLDERS[kind]]
    folder = next((f for f in folders if (f / first).is_file()), None)
    if folder is None:
        raise UsageError(
            f"{first} of {file} is not in {root}; expected the images in one of "
            f"{', '.join(str(f) for f in folders)}"
        )
    paths, texts = zip(*found, strict=True)
    images = ImageFiles([str(folder / path) for path in paths], texts=texts)
    return EvalDataset(name, images=images, captioned=True)
