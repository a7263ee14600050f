"""The folder of scenes: pictures with masks and boxes, in the layouts that others read.

    OUT/train/                trained concepts in trained styles
    OUT/heldout_captions/     the same styles: concepts whose captions are never trained
    OUT/heldout_style/        the concepts of train/ in a style that is never trained
    OUT/manifest.json         how it was made, credits

Each holds `images/000000.png`, `masks/000000.png` (8 bits: 0 the ground, k the k-th class),
`classnames.txt`, prompt templates, and `annotations.json` as COCO has it for instances: boxes
[left, top, width, height] and masks (run lengths down the columns) of what is seen of each thing.
"""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from PIL import Image

from data.class_names import write_class_names
from data.dense.picture import MOST_CLASSES
from data.emoji.build import is_built, split_concepts
from data.emoji.concepts import Concept, digest
from data.emoji.drawings import STYLES, check_can_draw
from data.emoji.words import TEMPLATES
from data.errors import UsageError
from data.files import replaced_folder
from data.locks import only_writer
from data.progress import Progress
from data.scenes.compose import Scene, compose

FORMAT = 1
SPLITS = ("train", "heldout_captions", "heldout_style")
LEFT_OUT = {
    "alphanum", "arrow", "av-symbol", "cat-face", "currency", "emotion", "family", "gender",
    "geometric", "heart", "keycap", "math", "monkey-face", "other-symbol", "punctuation",
    "religion", "sky-weather", "time", "transport-sign", "warning", "zodiac",
}  # fmt: skip
"""Unicode's subgroups of signs, clocks, moons and faces, as are all of faces, hands and people."""
KINDS = ("animal", "plant", "food", "place", "vehicle", "object")
_OF_SUBGROUP = {
    "animal": "animal", "plant": "plant", "food": "food", "drink": "food", "dishware": "food",
    "place": "place", "transport": "vehicle",
}  # fmt: skip


def build_scenes(
    out: str | Path,
    count: int = 200,
    size: int = 224,
    num_classes: int = 50,
    seed: int = 0,
    progress: bool = True,
    kinds: bool = False,
    boxes: bool = False,
) -> Path:
    """Build the folders under `out` and return it, at once where they are there already.

    count: scenes of each split; the first n are the same whatever the count. size: their side,
    pixels. num_classes: drawn from the things, animals, plants, food and places of each split, at
    most one of a group of variants. kinds: the classes are the six `KINDS` that each drawn thing is
    one of, the same in every split; else the things themselves. boxes: `train/` shows every trained
    thing, more than the labels of masks, and has boxes alone, in COCO's layout.
    `out` appears whole or not at all. Raises `UsageError` for impossible values, where another
    program is making `out`, and as `data.emoji.build.build_emoji`.
    """
    out = Path(out)
    if count < 1:
        raise UsageError(f"count {count}: at least one scene")
    if size < 32:
        raise UsageError(f"size {size}: scenes need at least 32 pixels a side")
    if not 2 <= num_classes <= MOST_CLASSES:
        raise UsageError(f"classes {num_classes}: allowed are 2 to {MOST_CLASSES}")
    if seed < 0:
        raise UsageError(f"seed {seed}: at least 0")
    recipe = {
        "format": FORMAT, "count": count, "size": size, "classes": num_classes, "seed": seed,
        "packages": {style: STYLES[style].version for style in STYLES},
    }  # fmt: skip
    if kinds and boxes:
        raise UsageError("kinds and boxes: masks of a few classes, or boxes of many")
    if kinds:
        recipe["kinds"] = True
    if boxes:
        recipe["boxes"] = True
    if is_built(out, recipe, "scenes"):
        return out
    check_can_draw()
    classes, drawings = _choose(num_classes, seed, boxes)
    with only_writer(out), replaced_folder(out) as part:
        for split in SPLITS:
            with_masks = not (boxes and split == "train")
            for name in ("images", "masks" if with_masks else "annotations"):
                (part / split / name).mkdir(parents=True)
            names = [concept.name for concept in classes[split]]
            labels = list(range(1, len(names) + 1))
            if kinds:
                names = list(KINDS)
                labels = [names.index(kind_of(c)) + 1 for c in classes[split]]
            things = _Things(drawings[split], labels)
            _write_split(part / split, names, things, count, size, seed, progress)
        credits = {s: {"by": STYLES[s].author, "licence": STYLES[s].licence} for s in STYLES}
        manifest = {**recipe, "credits": credits}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return out


def _choose(
    num_classes: int, seed: int, every: bool
) -> tuple[dict[str, list[Concept]], dict[str, list[list[str]]]]:
    """Of each split, its classes, and the drawings of each class in the split's styles. every: of
    train, all things."""
    split = split_concepts(tuple(STYLES))
    trained = [s for s in STYLES if STYLES[s].trained]
    new = [s for s in STYLES if not STYLES[s].trained]
    everywhere = [c for c in split.train if all(c.code in split.drawings[s] for s in new)]
    shared = _one_of_each_group(everywhere, num_classes, seed)
    unseen = _one_of_each_group(split.unseen, num_classes, seed)
    plan = {
        "train": (_one_of_each_group(split.train, None, seed) if every else shared, trained),
        "heldout_captions": (unseen, trained),
        "heldout_style": (shared, new),
    }
    drawings = {
        name: [[split.drawings[style][c.code] for style in styles] for c in classes]
        for name, (classes, styles) in plan.items()
    }
    return {name: classes for name, (classes, _) in plan.items()}, drawings


def _one_of_each_group(concepts: Sequence[Concept], count: int | None, seed: int) -> list[Concept]:
    """A fixed random choice; variants of one thing would be told apart by their hair alone. None:
    of all groups."""
    things = [
        concept
        for concept in concepts
        if concept.subgroup not in LEFT_OUT
        and not concept.subgroup.startswith(("face", "hand", "person"))
    ]
    shuffled = sorted(things, key=lambda c: digest("scenes", str(seed), c.code))
    chosen = list({c.group: c for c in reversed(shuffled)}.values())[::-1][:count]
    if count is not None and len(chosen) < count:
        raise UsageError(f"classes {count}: there are {len(chosen)}")
    return sorted(chosen, key=lambda c: c.name)


def _write_split(
    folder: Path,
    names: Sequence[str],
    things: "_Things",
    count: int,
    size: int,
    seed: int,
    progress: bool,
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    # each split has its own scenes
    seeds = [(seed, SPLITS.index(folder.name), number) for number in range(count)]
    workers = min(os.cpu_count() or 1, 1 + count // 50)
    with ExitStack() as stack:
        run: Any = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # forking is unsafe beside threads
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            run = partial(pool.map, chunksize=16)
        made = run(_make, repeat(things, count), repeat(size), seeds)
        bar = Progress(made, folder.name, count, unit=" scenes", disable=not progress)
        for number, scene in enumerate(bar):
            file = f"{number:06d}.png"
            Image.fromarray(scene.picture).save(folder / "images" / file)
            if (folder / "masks").is_dir():
                Image.fromarray(scene.mask).save(folder / "masks" / file)
            images.append({"id": number, "file_name": file, "width": size, "height": size})
            for thing in scene.things:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": thing.label,
                        "bbox": thing.box,
                        "area": int(thing.seen.sum()),
                        "segmentation": {"size": [size, size], "counts": run_lengths(thing.seen)},
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    instances = folder / "annotations" / "instances_train.json"
    where = folder / "annotations.json" if (folder / "masks").is_dir() else instances
    where.write_text(json.dumps(found) + "\n")
    write_class_names(folder, names, TEMPLATES)


class _Things(NamedTuple):
    """What is drawn, and the label of each."""

    drawings: Sequence[Sequence[str]]
    labels: Sequence[int]


def _make(things: _Things, size: int, seed: tuple[int, ...]) -> Scene:
    scene = compose(things.drawings, size, np.random.default_rng(seed))
    labelled = [replace(one, label=things.labels[one.label - 1]) for one in scene.things]
    return replace(scene, things=labelled)


def kind_of(concept: Concept) -> str:
    """One of `KINDS`."""
    return _OF_SUBGROUP.get(concept.subgroup.partition("-")[0], "object")


def run_lengths(mask: Bool[np.ndarray, "h w"]) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, pixels outside first."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(changes, prepend=0, append=mask.size).tolist()
