"""One scene: drawings pasted on a ground, and exactly where each is seen."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data.emoji.drawings import render
from data.scenes.grounds import draw_ground

NUM_THINGS = (3, 6)
"""Least and most in a scene."""
SIDES = (0.22, 0.6)
"""Of a thing's drawing, as shares of the scene's."""
LEAST_SEEN = 0.4
"""Share of a thing that others may not hide."""
TRIES = 20  # places tried for a thing before it is left out


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene, and where it is seen."""

    label: int
    """Of its class, from 1."""
    seen: Bool[np.ndarray, "s s"]
    """The pixels that it covers at least half, and nothing else does."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of what is seen, in pixels."""
        rows, columns = (np.flatnonzero(self.seen.any(axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


@dataclass(frozen=True)
class Scene:
    picture: UInt8[np.ndarray, "s s 3"]
    things: Sequence[Thing]

    @property
    def mask(self) -> UInt8[np.ndarray, "s s"]:
        """The label of each pixel; 0 is the ground."""
        mask = np.zeros(self.picture.shape[:2], np.uint8)
        for thing in self.things:
            mask[thing.seen] = thing.label
        return mask


def compose(drawings: Sequence[Sequence[str]], size: int, rng: np.random.Generator) -> Scene:
    """A scene of `size` pixels a side.

    drawings: SVG texts of each class. A later thing lies over an earlier one; a place is drawn
    again where it would hide too much, and the thing left out where no place is found.
    """
    picture = draw_ground(size, rng).astype(float)
    things: list[Thing] = []
    areas: list[int] = []
    number = int(rng.integers(NUM_THINGS[0], NUM_THINGS[1] + 1))
    for label in rng.choice(len(drawings), min(number, len(drawings)), replace=False):
        styles = drawings[int(label)]
        side = round(size * rng.uniform(*SIDES))
        rgba = render_cut_out(styles[int(rng.integers(len(styles)))], side)
        opaque = rgba[..., 3] >= 128
        for _ in range(TRIES):
            top, left = rng.integers(0, size - side + 1, 2)
            covered = np.zeros((size, size), bool)
            covered[top : top + side, left : left + side] = opaque
            seen = [thing.seen & ~covered for thing in things]
            hides = any(s.sum() < LEAST_SEEN * a for s, a in zip(seen, areas, strict=True))
            if opaque.any() and not hides:
                break
        else:
            continue
        alpha = rgba[..., 3:] / 255
        part = picture[top : top + side, left : left + side]
        part += alpha * (rgba[..., :3] - part)
        things = [Thing(t.label, s) for t, s in zip(things, seen, strict=True)]
        things.append(Thing(int(label) + 1, covered))
        areas.append(int(covered.sum()))
    return Scene(picture.round().astype(np.uint8), things)


def render_cut_out(svg: str, side: int) -> UInt8[np.ndarray, "n n 4"]:
    """A drawing as a square of RGBA, transparent around it."""
    png = render(svg, side, background=None)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
