"""Accuracy over cost, masks and boxes over cost, as plots."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import UsageError
from data.files import write_atomically
from data.numbers import rounded
from retrieval.detail import Detail, MaxTokens
from retrieval.evaluation.costs import PatchCost
from retrieval.evaluation.results import DatasetResult


def plot_accuracy(
    costs: Sequence[PatchCost], results: Sequence[DatasetResult], path: str | Path
) -> Path:
    """Top-1 accuracy against GFLOPs per image, a line per data set, one standard error as bars.

    Raises `UsageError` without matplotlib.
    """
    lines: list[Line] = []
    for dataset in results:
        if dataset.accuracy:
            best = {size: next(iter(by_k.values())) for size, by_k in dataset.accuracy.items()}
            points = {size: (e.value, e.standard_error) for size, e in best.items()}
            lines.append((f"{dataset.name} ({dataset.num_classes:,} classes)", points))
    return _plot(costs, lines, "zero-shot top-1 accuracy", path)


def plot_dense(
    costs: Sequence[PatchCost], results: Sequence[DatasetResult], path: str | Path
) -> Path:
    """Mean IoU, AP50 and PQ against GFLOPs per image, as far as the data sets have them.

    Raises `UsageError` without matplotlib.
    """
    lines: list[Line] = []
    for dataset in results:
        for what, name in (("miou", "mIoU"), ("ap50", "AP50"), ("pq", "PQ")):
            found = {s: getattr(scores, what) for s, scores in dataset.dense.items()}
            points = {s: (value, math.nan) for s, value in found.items() if value is not None}
            if points:
                lines.append((f"{dataset.name}: {name}", points))
    return _plot(costs, lines, "mIoU, AP50, PQ", path)


Line = tuple[str, Mapping[Detail, tuple[float, float]]]
"""Its name; of each patch size a share and its standard error."""


def _plot(costs: Sequence[PatchCost], lines: Sequence[Line], what: str, path: str | Path) -> Path:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator
    except ImportError as error:
        raise UsageError("a plot needs matplotlib; pip install matplotlib") from error

    costs = sorted(costs, key=lambda c: c.gflops)
    gflops = [c.gflops for c in costs]
    figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    colours = ["#0b62a4", "#d1495b", "#2e8b57", "#8a5fbf", "#c98a1b", "#4a4a4a"]
    markers = "osD^vP"
    for number, (name, points) in enumerate(lines):
        values = [points[c.patch_size] for c in costs]
        shares = [(value, 0.0 if math.isnan(error) else error) for value, error in values]
        bars = any(error for _, error in shares)
        axes.errorbar(
            gflops,
            [100 * share for share, _ in shares],
            yerr=[100 * error for _, error in shares] if bars else None,
            label=name,
            color=colours[number % len(colours)],
            marker=markers[number % len(markers)],
            markersize=5.5,
            linewidth=1.8,
            capsize=3,
            elinewidth=1.2,
        )
    axes.set_xscale("log")
    axes.set_xticks(gflops, [rounded(g, 2) for g in gflops])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("GFLOPs per image (image tower, log scale)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.06, y=0.12)
    axes.set_ylabel(what)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    top = axes.secondary_xaxis("top")
    sizes = [c.patch_size for c in costs]
    by_tokens = any(isinstance(size, MaxTokens) for size in sizes)
    top.set_xticks(gflops, [f"{s.count if isinstance(s, MaxTokens) else s}" for s in sizes])
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xlabel("patches at most" if by_tokens else "patch size (pixels)")
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)
    axes.legend(frameon=False, loc="lower right")
    path = Path(path)
    write_atomically(path, lambda out: figure.savefig(out, format=path.suffix[1:]))
    return path
