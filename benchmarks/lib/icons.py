"""Icons: distractors among the default drawings in a large corpus, or further training pairs.

They come from pinned npm packages of the Iconify project, under licences that allow this use and
are named here; they are drawn on this machine and never part of the project. Emoji and flags are
left out: they would be right answers that count as wrong.
"""

import json
import multiprocessing
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from data.emoji.drawings import render, svg_of
from data.emoji.npm import fetch_package, read_json
from data.files import replaced_folder
from data.progress import Progress
from data.shards.tar import add_member

SHARD_SIZE = 1000

PACKAGES = {  # name: version, licence
    "cryptocurrency-color": ("1.2.4", "CC0-1.0"),
    "devicon": ("1.2.68", "MIT"),
    "flat-color-icons": ("1.2.3", "MIT"),
    "fluent-color": ("1.2.21", "MIT"),
    "game-icons": ("1.2.4", "CC-BY-3.0"),
    "icon-park": ("1.2.4", "Apache-2.0"),
    "logos": ("1.2.19", "CC0-1.0"),
    "marketeq": ("1.2.2", "MIT"),
    "material-icon-theme": ("1.2.70", "MIT"),
    "mdi": ("1.2.3", "Apache-2.0"),
    "meteocons": ("1.2.4", "MIT"),
    "skill-icons": ("1.2.4", "MIT"),
    "streamline-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-cyber-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-flex-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-freehand-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-kameleon-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-plump-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-sharp-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-stickies-color": ("1.2.2", "CC-BY-4.0"),
    "streamline-ultimate-color": ("1.2.2", "CC-BY-4.0"),
    "tabler": ("1.2.41", "MIT"),
    "token-branded": ("1.2.45", "MIT"),
    "vscode-icons": ("1.2.97", "MIT"),
}


def build_icons(out: Path, size: int = 224) -> Path:
    """Shards of all icons, `PACKAGE-0000.tar` with KEY.png alone; at once where they are built.

    size: the images' side, pixels. An icon that cannot be drawn is left out.
    """
    if out.is_dir():
        return out
    keys: list[str] = []
    drawings: list[str] = []
    for package, (version, _) in PACKAGES.items():
        (icons,) = read_json(fetch_package(f"@iconify-json/{package}", version), "icons.json")
        keys += [f"{package}-{number:05d}" for number in range(len(icons["icons"]))]
        drawings += [svg_of(icon, icons) for icon in icons["icons"].values()]
    images = zip(keys, _draw_all(drawings, size), strict=True)
    good = ((key, png) for key, png in images if png)
    with replaced_folder(out) as part:
        for number in range(-(-len(drawings) // SHARD_SIZE)):
            shard = part / f"icons-{number:04d}.tar"
            with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
                for key, png in islice(good, SHARD_SIZE):
                    add_member(tar, f"{key}.png", png)
    return out


# ---- icons with names ----------------------------------------------------------------------

NAMED = (  # packages whose names are of things, not of brands; those in colour first
    "flat-color-icons", "fluent-color", "streamline-ultimate-color", "streamline-color",
    "streamline-kameleon-color", "streamline-freehand-color", "streamline-plump-color",
    "streamline-flex-color", "streamline-sharp-color", "streamline-cyber-color",
    "streamline-stickies-color", "marketeq", "meteocons", "icon-park", "game-icons", "mdi",
    "tabler",
)  # fmt: skip
_LOOKS = {
    "outline", "outlined", "fill", "filled", "flat", "duo", "line", "solid", "twotone", "light",
    "dark", "color", "alt", "variant", "sharp", "rounded",
}  # fmt: skip
_JOINING = {"a", "an", "and", "at", "by", "for", "in", "no", "of", "on", "or", "the", "to", "with"}
CAPTIONS = ("{}", "an icon of {}", "a drawing of {}", "a picture of {}")


def names_of(keys: Iterable[str], unlike: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, key) of icons that are unlike some names: that share no word with any of them.

    "a", "of" and the like and a last s aside. Words for an icon's looks and numbers are no part of
    its name; keys without a name of one to four words are left out.
    """
    unwanted = {word for name in unlike for word in _words(name)} - _JOINING
    for key in keys:
        name = " ".join(w for w in key.split("-") if not w.isdigit() and w not in _LOOKS)
        usable = re.fullmatch(r"[a-z]{2,}( [a-z]+){0,3}", name)
        if usable and unwanted.isdisjoint(_words(name)):
            yield name, key


def build_named_icons(out: Path, unlike: Sequence[str], size: int = 224) -> Path:
    """Shards of icons with captions, one icon for each of `names_of`; at once where they are
    built. Raises `UsageError` where a package can neither be found nor fetched."""
    if out.is_dir():
        return out
    drawings: dict[str, str] = {}  # by name
    for package in NAMED:
        found = fetch_package(f"@iconify-json/{package}", PACKAGES[package][0])
        (icons,) = read_json(found, "icons.json")
        for name, key in names_of(icons["icons"], unlike):
            drawings.setdefault(name, svg_of(icons["icons"][key], icons))
    images = zip(drawings, _draw_all(list(drawings.values()), size), strict=True)
    good = ((name, png) for name, png in images if png)
    with replaced_folder(out) as part:
        for number in range(-(-len(drawings) // SHARD_SIZE)):
            shard = part / f"named-icons-{number:04d}.tar"
            with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
                for name, png in islice(good, SHARD_SIZE):
                    key = "icon-" + name.replace(" ", "-")
                    add_member(tar, f"{key}.png", png)
                    add_member(tar, f"{key}.txt", name.encode())
                    about = {"captions": [caption.format(name) for caption in CAPTIONS]}
                    add_member(tar, f"{key}.json", json.dumps(about).encode())
    return out


def _words(name: str) -> set[str]:
    words = re.findall("[a-z]+", name.lower())
    return {w.removesuffix("s") if len(w) > 3 else w for w in words}


# ---- drawing -------------------------------------------------------------------------------


def _draw_all(drawings: Sequence[str], size: int) -> Iterator[bytes]:
    """The PNGs in order, b"" where one cannot be drawn; by all processors."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        drawn = pool.map(_draw, drawings, [size] * len(drawings), chunksize=64)
        yield from Progress(drawn, "drawing", len(drawings), unit=" icons")


def _draw(svg: str, size: int) -> bytes:
    """The icon's PNG, b"" where it cannot be drawn."""
    try:
        return render(svg, size)
    except ValueError:
        return b""
