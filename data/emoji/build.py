"""The offline default data: WebDataset shards of emoji, each concept drawn by several artists.

    python -m data.emoji OUT              # everything, about half a minute on two cores
    python -m data.emoji OUT --limit 40   # a small one, for trying things

    OUT/train/                noto, twemoji, openmoji: concepts whose captions are trained
    OUT/heldout_captions/     the same styles: concepts whose group of variants is never trained
    OUT/heldout_style/        emojione, a style never trained: concepts whose captions are trained
    OUT/manifest.json         counts, package versions, credits

A sample is `KEY.png` (on white), `KEY.txt` (its name) and `KEY.json` (its captions, where it comes
from); the held-out folders add `KEY.cls`, `classnames.txt` and prompt templates.
"""

import argparse
import importlib.util
import io
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

from tqdm import tqdm

from data.emoji.concepts import (
    Concept,
    digest,
    held_out_groups,
    load_concepts,
    plain_code,
    without_names_of,
)
from data.emoji.npm import fetch_package, read_json
from data.emoji.words import TEMPLATES
from data.errors import UsageError, exit_on_usage_error

FORMAT = 1
RECIPE = 1  # raised when captions, split or rendering change: folders of another recipe are refused
SEED = 0
SHARD_SIZE = 256  # samples; some 3 MB
CAPTIONS_PACKAGE = ("emojibase-data", "17.0.0")


@dataclass(frozen=True)
class Style:
    """One artist's set of drawings: an npm package of the Iconify project."""

    version: str
    trained: bool
    author: str
    licence: str

    @staticmethod
    def package(name: str) -> str:
        return f"@iconify-json/{name}"


STYLES: Mapping[str, Style] = {
    "noto": Style("1.2.9", True, "Google Inc", "Apache-2.0"),
    "twemoji": Style("1.2.5", True, "Twitter, Inc and other contributors", "CC-BY-4.0"),
    "openmoji": Style("1.2.29", True, "OpenMoji", "CC-BY-SA-4.0"),
    "emojione": Style("1.2.3", False, "Emoji One", "CC-BY-4.0"),
}

Sample = tuple[str, str, Concept, int | None]  # style, SVG, concept, class


def build_emoji(
    out: str | Path,
    size: int = 224,
    limit: int | None = None,
    styles: Sequence[str] = tuple(STYLES),
    progress: bool = True,
) -> Path:
    """Build the shards under `out` and return it; a second call with the same arguments returns at
    once.

    `size` is the images' side in pixels, `limit` a number of concepts (a fixed random choice).
    `out` appears whole or not at all. Raises `UsageError` for impossible values, when `out` holds
    something else, or when the packages can neither be found in the cache nor fetched.
    """
    out = Path(out)
    if size < 8:
        raise UsageError(f"size {size} is impossible: images need at least 8 pixels a side")
    if limit is not None and limit < 10:
        raise UsageError(f"limit {limit} is impossible: a split needs at least 10 concepts")
    if unknown := [name for name in styles if name not in STYLES]:
        raise UsageError(f"no style {unknown[0]!r}: choose from {', '.join(STYLES)}")
    recipe = {
        "format": FORMAT,
        "recipe": RECIPE,
        "seed": SEED,
        "size": size,
        "limit": limit,
        "packages": dict([CAPTIONS_PACKAGE, *((s, STYLES[s].version) for s in styles)]),
    }
    if _is_built(out, recipe):
        return out
    if importlib.util.find_spec("resvg_py") is None:
        raise UsageError("no resvg_py here to draw with: `pip install 'flexilit[demo]'`")
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        counts = _write(partial, size, limit, styles, progress)
        credits = {s: {"by": STYLES[s].author, "licence": STYLES[s].licence} for s in styles}
        manifest = {**recipe, "counts": counts, "credits": credits}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        try:
            os.rename(partial, out)
        except OSError:  # someone else was faster
            if not _is_built(out, recipe):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _is_built(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether `out` already holds this build; refuses to touch a folder of anything else."""
    if not out.exists():
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError):
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise UsageError(
            f"{out} is not a folder of emoji shards: give a new or empty one"
        ) from None
    for name, wanted in recipe.items():
        if manifest.get(name) != wanted:
            raise UsageError(
                f"{out} was built with {name} {manifest.get(name)!r}, not {wanted!r}: "
                "remove it or give another folder"
            )
    return True


def _write(
    root: Path, size: int, limit: int | None, styles: Sequence[str], progress: bool
) -> dict[str, Any]:
    concepts = load_concepts(fetch_package(*CAPTIONS_PACKAGE))
    drawings = {s: load_drawings(s, concepts) for s in styles}
    trained_styles = [s for s in styles if STYLES[s].trained]
    concepts = [c for c in concepts if all(c.code in drawings[s] for s in trained_styles)]
    concepts.sort(key=lambda c: digest("order", str(SEED), c.code))  # neighbours do not look alike
    concepts = concepts[:limit]
    held_out = held_out_groups(concepts, SEED)
    unseen = [c for c in concepts if c.group in held_out]
    train = without_names_of([c for c in concepts if c.group not in held_out], unseen)

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
            (root / folder / "classnames.txt").write_text("".join(f"{c.name}\n" for c in classes))
            templates = root / folder / "zeroshot_classification_templates.txt"
            templates.write_text("".join(f"{t}\n" for t in TEMPLATES))
    images: dict[str, int] = {}
    for name, part in plan.items():
        images[Path(name).parent.name] = images.get(Path(name).parent.name, 0) + len(part)
    return {
        "concepts": len(concepts),
        "groups": len({c.group for c in concepts}),
        "trained_concepts": len(train),
        "heldout_concepts": len(unseen),
        "heldout_groups": len(held_out),
        "images": images,
    }


def load_drawings(style: str, concepts: Sequence[Concept]) -> dict[str, str]:
    """SVG text of each concept that a style draws, by the concept's code.

    Joined by code points; a style without any (emojione) is joined by the icons' names.
    """
    package = fetch_package(Style.package(style), STYLES[style].version)
    icons, codes = read_json(package, "icons.json", "chars.json")
    if not codes:
        noto = fetch_package(Style.package("noto"), STYLES["noto"].version)
        (codes,) = read_json(noto, "chars.json")
    by_code = {plain_code(code): icon for code, icon in codes.items()}
    drawings = {}
    for concept in concepts:
        name = by_code.get(concept.code)
        name = icons["aliases"].get(name, {"parent": name})["parent"]
        if icon := icons["icons"].get(name):
            drawings[concept.code] = svg_of(icon, icons)
    return drawings


def svg_of(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> str:
    """An icon of an Iconify package as SVG, in the middle of a square."""
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int) -> bytes:
    """A drawing on white as a square PNG of `size` pixels a side."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
    )


def _write_shards(root: Path, plan: Mapping[str, list[Sample]], size: int, progress: bool) -> None:
    drawings = [svg for part in plan.values() for _, svg, _, _ in part]
    workers = min(os.cpu_count() or 1, 1 + len(drawings) // 50)
    context = multiprocessing.get_context("spawn")  # whoever calls may have threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pngs: Iterator[bytes] = pool.map(render, drawings, [size] * len(drawings), chunksize=16)
        pngs = iter(tqdm(pngs, "drawing", len(drawings), unit=" images", disable=not progress))
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


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: two builds are byte-identical
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.emoji", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to build; must be new, empty, or built")
    parser.add_argument("--limit", type=int, help="only this many concepts (default: all)")
    parser.add_argument("--size", type=int, default=224, help="images' side, pixels (default: 224)")
    args = parser.parse_args()
    with exit_on_usage_error():
        out = build_emoji(args.out, args.size, args.limit)
        print(f"{out}: {json.dumps(json.loads((out / 'manifest.json').read_text())['counts'])}")
