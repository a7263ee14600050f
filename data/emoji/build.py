"""The folder of the offline default data: shards of emoji, each concept drawn by several artists.

    OUT/train/                noto, twemoji, openmoji: concepts whose captions are trained
    OUT/heldout_captions/     the same styles: concepts whose group of variants is never trained
    OUT/heldout_style/        emojione, a style never trained: concepts whose captions are trained
    OUT/manifest.json         counts, package versions, credits

A sample is `KEY.png` (on white), `KEY.txt` (its name) and `KEY.json` (its captions and its origin);
the held-out folders add `KEY.cls`, `classnames.txt` and prompt templates.
"""

import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.class_names import write_class_names
from data.emoji.concepts import (
    Concept,
    digest,
    held_out_groups,
    load_concepts,
    without_names_of,
)
from data.emoji.drawings import STYLES, check_can_draw, load_drawings, render
from data.emoji.npm import fetch_package
from data.emoji.words import TEMPLATES
from data.errors import UsageError
from data.progress import Progress
from data.shards.tar import add_member

FORMAT = 1
RECIPE = 1  # raised when captions, split or rendering change; folders of other recipes are refused
SEED = 0
SHARD_SIZE = 256  # samples; some 3 MB
CAPTIONS_PACKAGE = ("emojibase-data", "17.0.0")


Sample = tuple[str, str, Concept, int | None]  # style, SVG, concept, class


def build_emoji(
    out: str | Path,
    size: int = 224,
    limit: int | None = None,
    styles: Sequence[str] = tuple(STYLES),
    progress: bool = True,
) -> Path:
    """Build the shards under `out` and return it, at once where they are there already.

    `size` is the images' side in pixels, `limit` a number of concepts (a fixed random choice).
    `out` appears whole or not at all. Raises `UsageError` for impossible values, when `out` holds
    something else, or when the packages can neither be found in the cache nor fetched.
    """
    out = Path(out)
    if size < 8:
        raise UsageError(f"size {size}: images need at least 8 pixels a side")
    if limit is not None and limit < 10:
        raise UsageError(f"limit {limit}: a split needs at least 10 concepts")
    if unknown := [name for name in styles if name not in STYLES]:
        raise UsageError(f"no style {unknown[0]!r}; allowed: {', '.join(STYLES)}")
    recipe = {
        "format": FORMAT,
        "recipe": RECIPE,
        "seed": SEED,
        "size": size,
        "limit": limit,
        "packages": dict([CAPTIONS_PACKAGE, *((s, STYLES[s].version) for s in styles)]),
    }
    if is_built(out, recipe, "emoji shards"):
        return out
    check_can_draw()
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = _write(partial, size, limit, styles, progress)
        credits = {s: {"by": STYLES[s].author, "licence": STYLES[s].licence} for s in styles}
        manifest = {**recipe, "counts": counts, "credits": credits}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            os.rename(partial, out)
        except OSError:  # another process was faster
            if not is_built(out, recipe, "emoji shards"):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def is_built(out: Path, recipe: Mapping[str, Any], what: str) -> bool:
    """Whether `out` holds what its manifest says was made by `recipe`.

    Raises `UsageError` where it holds anything else; what: its name for the message.
    """
    if not out.exists():
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError):
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise UsageError(f"{out} is not a folder of {what}: give a new or empty one") from None
    for name, wanted in recipe.items():
        if manifest.get(name) != wanted:
            raise UsageError(
                f"{out} was built with {name} {manifest.get(name)!r}, not {wanted!r}: "
                "remove it or give another folder"
            )
    return True


@dataclass(frozen=True)
class Split:
    """The concepts that every trained style draws, and on which side each is."""

    concepts: list[Concept]
    train: list[Concept]
    """Without captions that are the name of one of the others."""
    unseen: list[Concept]
    drawings: dict[str, dict[str, str]]
    """Style -> code of a concept -> SVG."""


def split_concepts(styles: Sequence[str], limit: int | None = None) -> Split:
    """The split of the default data. limit: only so many concepts, a fixed random choice."""
    concepts = load_concepts(fetch_package(*CAPTIONS_PACKAGE))
    drawings = {s: load_drawings(s, concepts) for s in styles}
    trained_styles = [s for s in styles if STYLES[s].trained]
    concepts = [c for c in concepts if all(c.code in drawings[s] for s in trained_styles)]
    concepts.sort(key=lambda c: digest("order", str(SEED), c.code))  # neighbours do not look alike
    concepts = concepts[:limit]
    held_out = held_out_groups(concepts, SEED)
    unseen = [c for c in concepts if c.group in held_out]
    train = without_names_of([c for c in concepts if c.group not in held_out], unseen)
    return Split(concepts, train, unseen, drawings)


def _write(
    root: Path, size: int, limit: int | None, styles: Sequence[str], progress: bool
) -> dict[str, Any]:
    split = split_concepts(styles, limit)
    concepts, train, unseen, drawings = split.concepts, split.train, split.unseen, split.drawings

    def samples(style: str, chosen: list[Concept], classes: list[Concept]) -> list[Sample]:
        numbers = {c.code: i for i, c in enumerate(classes)}
        return [
            (style, drawings[style][c.code], c, numbers.get(c.code))
            for c in chosen
            if c.code in drawings[style]
        ]

    plan: dict[str, list[Sample]] = {}  # shard -> samples
    for style in styles:
        for folder, chosen, classes in (
            (("train", train, []), ("heldout_captions", unseen, unseen))
            if STYLES[style].trained
            else (("heldout_style", train, concepts),)
        ):
            part = samples(style, chosen, classes)
            for start in range(0, len(part), SHARD_SIZE):
                name = f"{folder}/{style}-{start // SHARD_SIZE:04d}.tar"
                plan[name] = part[start : start + SHARD_SIZE]
    _write_shards(root, plan, size, progress)
    for folder, classes in (("heldout_captions", unseen), ("heldout_style", concepts)):
        if (root / folder).exists():
            write_class_names(root / folder, (c.name for c in classes), TEMPLATES)
    images: dict[str, int] = {}
    for name, part in plan.items():
        images[Path(name).parent.name] = images.get(Path(name).parent.name, 0) + len(part)
    return {
        "concepts": len(concepts),
        "groups": len({c.group for c in concepts}),
        "trained_concepts": len(train),
        "heldout_concepts": len(unseen),
        "heldout_groups": len({c.group for c in unseen}),
        "images": images,
    }


def _write_shards(root: Path, plan: Mapping[str, list[Sample]], size: int, progress: bool) -> None:
    drawings = [svg for part in plan.values() for _, svg, _, _ in part]
    workers = min(os.cpu_count() or 1, 1 + len(drawings) // 50)
    context = multiprocessing.get_context("spawn")  # forking is unsafe where the caller has threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pngs: Iterator[bytes] = pool.map(render, drawings, [size] * len(drawings), chunksize=16)
        pngs = iter(Progress(pngs, "drawing", len(drawings), unit=" images", disable=not progress))
        for name, part in plan.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(root / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for (style, _, concept, label), png in zip(part, pngs, strict=False):
                    key = f"{style}-{concept.code}"
                    about = {
                        "captions": concept.captions,
                        "label": concept.name,
                        "style": style,
                        "group": concept.group,
                        "subgroup": concept.subgroup,
                    }
                    add_member(tar, f"{key}.png", png)
                    add_member(tar, f"{key}.txt", concept.name.encode())
                    add_member(tar, f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
                    if label is not None:
                        add_member(tar, f"{key}.cls", str(label).encode())
