"""Drawings of emoji: the artists' sets, which concepts they draw, and rendering to pixels."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.emoji.concepts import Concept, plain_code
from data.emoji.npm import fetch_package, read_json
from data.errors import UsageError


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


def check_can_draw() -> None:
    """Raise `UsageError` where what draws is not installed."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UsageError("resvg-py, which draws, is not installed: `pip install 'flexilit[demo]'`")


def render(svg: str, size: int, background: str | None = "#ffffff") -> bytes:
    """A drawing on white as a square PNG of `size` pixels a side; None: on nothing."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background=background, skip_system_fonts=True
        )
    )
