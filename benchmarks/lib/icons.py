"""Icons as distractors among the default drawings, which make a large corpus to search.

They come from pinned npm packages of the Iconify project, under licences that allow this use and
are named here; they are drawn on this machine and never part of the project. Emoji and flags are
left out: they would be right answers that count as wrong.
"""

import multiprocessing
import os
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from data.emoji.build import add_member
from data.emoji.drawings import render, svg_of
from data.emoji.npm import fetch_package, read_json
from data.progress import Progress

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
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    keys: list[str] = []
    drawings: list[str] = []
    for package, (version, _) in PACKAGES.items():
        (icons,) = read_json(fetch_package(f"@iconify-json/{package}", version), "icons.json")
        keys += [f"{package}-{number:05d}" for number in range(len(icons["icons"]))]
        drawings += [svg_of(icon, icons) for icon in icons["icons"].values()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        drawn = pool.map(_draw, drawings, [size] * len(drawings), chunksize=64)
        images = zip(keys, Progress(drawn, "drawing", len(drawings), unit=" icons"), strict=True)
        good = ((key, png) for key, png in images if png)
        for number in range(-(-len(drawings) // SHARD_SIZE)):
            shard = part / f"icons-{number:04d}.tar"
            with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
                for key, png in islice(good, SHARD_SIZE):
                    add_member(tar, f"{key}.png", png)
    part.rename(out)
    return out


def _draw(svg: str, size: int) -> bytes:
    """The icon's PNG, b"" where it cannot be drawn."""
    try:
        return render(svg, size)
    except ValueError:
        return b""
