"""Labelled pictures, square and not: drawings of the held-out style, and photographs."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from contrastive.recipes import default_data
from data.class_names import CLASS_NAMES_FILE, TEMPLATES_FILE, read_class_names, read_templates
from data.emoji.build import build_emoji
from data.images import to_rgb
from data.photographs.build import (
    build_photographs,
    fetch_package,
    read_stamps,
    unpack_stamps,
)
from lib.tars import read_tar

SEED = 0
WAYS = ("cut", "padded")
PHOTOGRAPHS = Path("runs/data/photographs")


@dataclass(frozen=True)
class PictureSet:
    """Pictures, what each shows, and which are alike.

    labels: rows of `class_names`. kinds: whose nearest neighbours are right, Unicode's subgroups or
    the package's folders.
    """

    pictures: list[Image.Image]
    labels: Int[np.ndarray, " n"]
    kinds: Int[np.ndarray, " n"]
    class_names: list[str]
    templates: list[str]
    way: Int[np.ndarray, " n"] | None = None
    """Rows of `WAYS`, of drawings that were made so."""

    def __len__(self) -> int:
        return len(self.pictures)


def drawings(limit: int | None = None, shaped: bool = False) -> PictureSet:
    """The held-out style, squares; `limit`: a fixed random choice of so many.

    shaped: each is made twice as wide as high, or as high as wide, by turns: half of them are cut,
    the others padded with white, at a random place.
    """
    folder = build_emoji(default_data()) / "heldout_style"
    pictures, labels, subgroups = [], [], []
    for file in sorted(folder.glob("*.tar")):
        members = read_tar(file)
        for name in members:
            if name.endswith(".png"):
                pictures.append(_image(members[name]))
                about = json.loads(members[name.replace(".png", ".json")])
                subgroups.append(about["subgroup"])
                labels.append(int(members[name.replace(".png", ".cls")]))
    rows = _choice(len(pictures), limit)
    chosen = [pictures[row] for row in rows]
    way = None
    if shaped:
        rng = np.random.default_rng(SEED)
        order = rng.permutation(len(chosen))
        places, way = rng.random(len(chosen)), order // 2 % 2
        chosen = [
            _shaped(picture, int(number), float(place))
            for picture, number, place in zip(chosen, order, places, strict=True)
        ]
    return PictureSet(
        chosen,
        np.array(labels)[rows],
        np.unique(subgroups, return_inverse=True)[1][rows],
        *_names(folder),
        way,
    )


def photographs(limit: int | None = None, shaped: bool = False) -> PictureSet:
    """Cut-out photographs on white: `shaped` as they are, else in the middle of a square.

    limit: a fixed random choice of so many.
    """
    stamps = read_stamps()
    folder = build_photographs(PHOTOGRAPHS)
    names, templates = _names(folder)
    if shaped:
        files = unpack_stamps(fetch_package(), stamps)
        pictures = [_image(files[path]) for path in stamps]
    else:
        members = read_tar(folder / "0.tar")
        keys = [path.removesuffix(".png").replace("/", "-") for path in stamps]
        pictures = [_image(members[f"{key}.png"]) for key in keys]
    folders = [path.rpartition("/")[0] for path in stamps]
    rows = _choice(len(pictures), limit)
    return PictureSet(
        [pictures[row] for row in rows],
        np.array([names.index(name) for name in stamps.values()])[rows],
        np.unique(folders, return_inverse=True)[1][rows],
        names,
        templates,
    )


def _choice(count: int, limit: int | None) -> Int[np.ndarray, " n"]:
    return np.sort(np.random.default_rng(SEED).permutation(count)[:limit])


def _shaped(picture: Image.Image, number: int, place: float) -> Image.Image:
    """number: of the four ways. place: 0 to 1, along the side that is cut or padded."""
    side, wide = picture.width, number % 2 == 0
    if WAYS[number // 2 % 2] == "cut":
        start = round(place * side / 2)
        band = (0, start, side, start + side // 2)
        return picture.crop(band if wide else (band[1], band[0], band[3], band[2]))
    start = round(place * side)
    canvas = Image.new("RGB", (2 * side, side) if wide else (side, 2 * side), "white")
    canvas.paste(picture, (start, 0) if wide else (0, start))
    return canvas


def _image(png: bytes) -> Image.Image:
    """RGB, transparency over white."""
    return to_rgb(Image.open(io.BytesIO(png)))


def _names(folder: Path) -> tuple[list[str], list[str]]:
    return read_class_names(folder / CLASS_NAMES_FILE), read_templates(folder / TEMPLATES_FILE)
