"""Textured grounds, drawn from a random generator: nothing of them is a thing with a name."""

import colorsys
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

OCTAVES = 4


def draw_ground(size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "s s 3"]:
    """A square of two colours mixed by clouds, stripes, checks, dots or a slope, with grain."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](size, rng)[..., None]
    one, other = _colours(rng)
    mixed = one * (1 - pattern) + other * pattern
    light = 1 + 0.12 * (_clouds(size, rng)[..., None] - 0.5)
    grain = rng.normal(0, rng.uniform(0, 6), (size, size, 1))
    return (255 * mixed * light + grain).clip(0, 255).round().astype(np.uint8)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two that belong together: hues nearby, both of low saturation, apart in lightness."""
    hue, saturation, light = rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.45, 0.95)
    near = (hue + rng.uniform(-0.08, 0.08)) % 1
    darker = light * rng.uniform(0.7, 0.93)
    one = np.array(colorsys.hsv_to_rgb(hue, saturation, light))
    return one, np.array(colorsys.hsv_to_rgb(near, saturation, darker))


def _clouds(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    """Value noise of several octaves, in [0, 1]."""
    total = np.zeros((size, size))
    for octave in range(OCTAVES):
        cells = rng.random((2 ** (octave + 1) + 1,) * 2).astype(np.float32)
        smooth = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) / 2**octave
    total -= total.min()
    return total / max(float(total.max()), 1e-9)


def _axis(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    """Distance along a random direction, in sides."""
    angle = rng.uniform(0, np.pi)
    down, across = np.mgrid[:size, :size] / size
    return across * np.cos(angle) + down * np.sin(angle)


def _stripes(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    return 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(3, 16) * _axis(size, rng))


def _checks(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    cells, (down, across) = rng.integers(4, 17), np.mgrid[:size, :size]
    return ((down * cells // size + across * cells // size) % 2).astype(float)


def _dots(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    cells, radius = rng.integers(5, 15), rng.uniform(0.15, 0.4)
    down, across = (np.mgrid[:size, :size] * cells / size) % 1 - 0.5
    return ((radius - np.hypot(down, across)) * size / cells).clip(0, 1)


def _slope(size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s"]:
    along = _axis(size, rng)
    return (along - along.min()) / np.ptp(along)


PATTERNS: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (
    _clouds, _stripes, _checks, _dots, _slope,
)  # fmt: skip
