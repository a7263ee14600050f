"""Small trees in the layout of published archives: all folders, one tiny image each."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from shard_maker import png


def write_tree(root: Path, files: Iterable[str]) -> Path:
    """Every file is a link to the same image of 16 x 16 pixels, whatever its suffix."""
    root.mkdir(parents=True, exist_ok=True)
    image = root / ".image"
    image.write_bytes(png(0))
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(image, path)
    image.unlink()
    return root


def write_karpathy(root: Path, kind: str, images: Mapping[str, list[str]], split: str) -> None:
    """dataset_KIND.json; images: file name (with COCO's folder before it) -> captions."""
    entries = []
    for number, (file, captions) in enumerate(images.items()):
        folder, _, name = file.rpartition("/")
        entries.append(
            {
                "filename": name,
                "imgid": number,
                "split": split,
                "sentences": [{"raw": caption, "sentid": 0, "tokens": []} for caption in captions],
            }
            | ({"filepath": folder} if folder else {})
        )
    entries.append({"filename": "t.jpg", "split": "train", "sentences": [{"raw": "trained on"}]})
    (root / f"dataset_{kind}.json").write_text(json.dumps({"images": entries, "dataset": kind}))
