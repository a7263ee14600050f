"""Search by region: scenes of three things, one of which is looked for.

    python benchmarks/regions.py                 # after make demo
    python benchmarks/regions.py --scenes 10     # a short run that only shows that it works

Scenes of `python -m data.scenes` with exactly three things, of trained concepts, of concepts whose
captions are never trained and of a style that is never trained, all in one index by the demo's
model. Each of their classes is looked for by its name, and by its drawing on white. Recall@10: of
the scenes that show it, the share among the first ten (of ten where they are more), mean over
classes, apart by the folder of the class. Contenders: whole pictures; regions (`index_regions`);
the means of the patches of the same windows, from the one forward that reads the whole picture.
"""

import argparse
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from contrastive import LitModel
from contrastive.recipes import default_data
from data.emoji.build import build_emoji, split_concepts
from data.emoji.drawings import STYLES, render
from data.scenes.build import SPLITS, build_scenes
from lib.harness import Target, finish
from retrieval import Searcher, index_photos, index_regions
from retrieval.regions.boxes import WINDOWS

OUT = Path("runs/regions")
MODEL = Path("runs/demo/model")
COUNT = 200  # scenes built of each folder
THINGS = 3
SIZES = (56, 28)
K = 10


class Scenes:
    """Photos OUT/photos/SPLIT/NUMBER.png, and which classes each shows."""

    def __init__(self, root: Path, most: int) -> None:
        self.keys: list[str] = []
        self.names: dict[str, list[str]] = {}
        self.shown: dict[str, set[str]] = defaultdict(set)  # "split/name" -> keys
        self.folder = OUT / f"photos.{most}"
        for split in SPLITS:
            found = json.loads((root / split / "annotations.json").read_text())
            self.names[split] = [category["name"] for category in found["categories"]]
            things = defaultdict(set)
            for thing in found["annotations"]:
                things[thing["image_id"]].add(thing["category_id"])
            (self.folder / split).mkdir(parents=True, exist_ok=True)
            for image in [i for i in found["images"] if len(things[i["id"]]) == THINGS][:most]:
                key = f"{split}/{image['file_name']}"
                shutil.copyfile(root / split / "images" / image["file_name"], self.folder / key)
                self.keys.append(key)
                for label in things[image["id"]]:
                    # trained concepts are the same in train/ and in the held-out style
                    self.shown[self.names[split][label - 1]].add(key)

    def relevant(self, split: str) -> Bool[np.ndarray, "q n"]:
        """Of each class of a folder, the scenes of that folder that show it."""
        rows = [
            [key in self.shown[name] and key.startswith(f"{split}/") for key in self.keys]
            for name in self.names[split]
        ]
        return np.array(rows)

    def ignored(self, split: str) -> Bool[np.ndarray, "q n"]:
        """Those of other folders that show it too, which count neither way."""
        rows = [
            [key in self.shown[name] and not key.startswith(f"{split}/") for key in self.keys]
            for name in self.names[split]
        ]
        return np.array(rows)


def drawings(names: Sequence[str], split: str) -> list[Image.Image]:
    """A drawing of each on white, in a style of the folder."""
    concepts = split_concepts(tuple(STYLES))
    by_name = {concept.name: concept.code for concept in (*concepts.train, *concepts.unseen)}
    style = next(s for s in STYLES if STYLES[s].trained == (split != "heldout_style"))
    files = [render(concepts.drawings[style][by_name[name]], 224) for name in names]
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def recall(
    similarities: Float[np.ndarray, "q n"],
    relevant: Bool[np.ndarray, "q n"],
    ignored: Bool[np.ndarray, "q n"],
) -> float:
    """Recall@10, mean over the classes that some scene shows."""
    found = []
    for line, wanted, left_out in zip(similarities, relevant, ignored, strict=True):
        if wanted.any():
            first = np.argsort(-np.where(left_out, -np.inf, line), kind="stable")[:K]
            found.append(wanted[first].sum() / min(K, wanted.sum()))
    return round(float(np.mean(found)), 4)


def similarities_of(
    searcher: Searcher, keys: Sequence[str], queries: Sequence[Any], **options: Any
) -> Float[np.ndarray, "q n"]:
    """Of each query and picture."""
    places = {key: number for number, key in enumerate(keys)}
    out = np.full((len(queries), len(keys)), -np.inf, np.float32)
    for row, hits in enumerate(searcher.search(queries, k=len(keys), **options)):
        for hit in hits:
            out[row, places[hit.key]] = hit.similarity
    return out


def window_means(
    model: LitModel, pictures: Sequence[Image.Image], size: int
) -> Float[np.ndarray, "n w d"]:
    """Unit-norm means of the patches in each window."""
    maps = model.encode_patches(list(pictures), size).numpy()
    side = maps.shape[1]
    means = []
    for box in WINDOWS:
        left, top, right, bottom = (round(edge * side) for edge in box)
        part = maps[:, top : max(bottom, top + 1), left : max(right, left + 1)]
        means.append(part.mean((1, 2)))
    stacked = np.stack(means, axis=1)
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)


def measure(scenes: Scenes, model: LitModel) -> dict[str, Any]:
    """Recalls by folder, query, patch size and contender."""
    rows: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    pictures = [Image.open(scenes.folder / key).convert("RGB") for key in scenes.keys]
    for size in SIZES:
        index = OUT / f"index.{size}"
        shutil.rmtree(index, ignore_errors=True)
        index_photos(scenes.folder, MODEL, index, (size,), num_workers=0)
        index_regions(index, model=model)
        searcher = Searcher.load(index, model)
        means = window_means(model, pictures, size)
        for split in SPLITS:
            relevant, ignored = scenes.relevant(split), scenes.ignored(split)
            names, drawn = scenes.names[split], drawings(scenes.names[split], split)
            asked: dict[str, tuple[Sequence[Any], Tensor]] = {
                "name": (names, model.encode_text(names)),
                "picture": (drawn, model.encode_image(drawn, size)),
            }
            for what, (queries, embeds) in asked.items():
                found = {
                    "whole": similarities_of(searcher, scenes.keys, queries),
                    "regions": similarities_of(searcher, scenes.keys, queries, regions=True),
                    "window means": np.einsum("qd,nwd->qnw", embeds.numpy(), means).max(-1),
                }
                rows[split][what][str(size)] = {
                    name: recall(values, relevant, ignored) for name, values in found.items()
                }
                print(split, what, size, rows[split][what][str(size)], flush=True)
    return rows


def mean_ratio(rows: Mapping[str, Any], what: str, size: int) -> float:
    """Of the recalls' means over folders."""
    parts = [rows[split][what][str(size)] for split in SPLITS]
    return round(sum(p["regions"] for p in parts) / sum(p["whole"] for p in parts), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=40, help="of three things, of each folder")
    args = parser.parse_args()
    build_emoji(default_data())
    scenes = Scenes(build_scenes(OUT / f"scenes.{COUNT}", count=COUNT), args.scenes)
    rows = measure(scenes, LitModel.from_pretrained(MODEL))
    targets = [
        Target(
            f"recall@10 by {what}, patch {size}: regions over whole pictures",
            ">= 1.3",
            mean_ratio(rows, what, size),
        )
        for what in ("name", "picture")
        for size in SIZES
    ]
    figures = {"scenes": len(scenes.keys), "rows": rows}
    finish("regions", figures, targets, packages=("torch", "timm", "transformers", "numpy"))


if __name__ == "__main__":
    main()
