"""The figure of benchmarks/dense.py: words over scenes, coarse and fine."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, UInt8

from lib.dense_maps import Scenes
from retrieval import ZeroShotSegmenter
from retrieval.dense.upsample import upsampled

SIZES = (56, 28, 14)
ROW, SPLIT, NUM_SCENES = "[class; mean]", "heldout_style", 3
Column: TypeAlias = Callable[[int], tuple[Float[np.ndarray, "r c k"], float]]
"""Number of a scene -> its map, and the least similarity that is no ground."""
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#f032e6", "#9a6324")


def draw_figure(
    file: Path,
    segmenter_of: Callable[[str, int, str], ZeroShotSegmenter],
    scenes: Mapping[str, Scenes],
    measured: Mapping[str, Mapping[str, float]],
) -> None:
    """Patch sizes side by side."""
    of, segmenter = scenes[SPLIT], segmenter_of(ROW, 0, SPLIT)

    def at(size: int) -> Column:
        least = measured[f"{ROW}/0@{size}"]["threshold"]
        return lambda number: (segmenter.similarities(of.pictures[number], size)[0], least)

    draw_columns(file, of, {f"patch {s}: {224 // s} x {224 // s}": at(s) for s in SIZES})


def draw_columns(file: Path, of: Scenes, columns: Mapping[str, Column]) -> None:
    """The first scenes that have three things or more, without a choice, and maps of each.

    Beside each, the names of its own things compete alone, for every pixel; ground is what lies
    below the threshold that was chosen on scenes of trained styles.
    """
    chosen = [n for n, mask in enumerate(of.masks) if len(np.unique(mask)) > 3][:NUM_SCENES]
    fig, axes = plt.subplots(
        len(chosen), 2 + len(columns), figsize=(2.3 * (2 + len(columns)), 2.62 * len(chosen)),
        dpi=130, squeeze=False,
    )  # fmt: skip
    for axis, title in zip(axes[0], ("picture", *columns, "truth"), strict=True):
        axis.set_title(title, fontsize=10)
    for line, number in zip(axes, chosen, strict=True):
        picture, true = np.asarray(of.pictures[number]), of.masks[number]
        labels = [int(label) for label in np.unique(true) if label]
        colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
        line[0].imshow(picture)
        for axis, column in zip(line[1:], columns.values(), strict=False):
            maps, least = column(number)
            axis.imshow(_painted(picture, _named(maps, labels, true.shape, least), colours))
        line[-1].imshow(_painted(picture, true, colours))
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        for place, label in enumerate(labels):  # the words, one below each picture, then below them
            line[place % len(line)].text(
                0.5, -0.04 - 0.1 * (place // len(line)), of.folder.class_names[label - 1],
                color=colours[label], transform=line[place % len(line)].transAxes,
                ha="center", va="top", fontsize=10, fontweight="bold",
            )  # fmt: skip
    fig.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.05, wspace=0.04, hspace=0.16)
    fig.savefig(file)
    plt.close(fig)


def _named(
    maps: Float[np.ndarray, "r c k"], labels: list[int], shape: tuple[int, ...], least: float
) -> UInt8[np.ndarray, "h w"]:
    """The label of these that each pixel is most like; 0 below `least`."""
    chosen = np.ascontiguousarray(maps[..., np.array(labels) - 1])
    out = np.zeros(shape, np.uint8)
    for rows, values in upsampled(chosen, (shape[0], shape[1])):
        scores, best = (found.numpy() for found in values.max(0))
        out[rows] = np.where(scores < least, 0, np.array(labels)[best])
    return out


def _painted(
    picture: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"], colours: Mapping[int, str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Colour over what has a label; the rest in pale grey."""
    grey = picture.mean(-1, keepdims=True).repeat(3, -1)
    out = 0.35 * grey + 0.65 * 255
    for label, colour in colours.items():
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        out[mask == label] = 0.3 * grey[mask == label] + 0.7 * rgb
    return out.round().astype(np.uint8)
