"""The table this project is about: per patch size, what it costs and what it gives."""

import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from contrastive.distributed import is_main
from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.evaluation.metrics import Estimate, Recall
from retrieval.evaluation.table import Column, fixed_width


@dataclass(frozen=True)
class PatchCost:
    """What one patch size costs per image."""

    patch_size: int  # pixels
    tokens: int
    gflops: float  # 2 x multiply-adds, 10^9
    images_per_second: tuple[float, float, float]  # median, lowest, highest of the repeats


@dataclass(frozen=True)
class DatasetResult:
    """What one dataset gave, per patch size."""

    name: str
    num_images: int  # that were read
    num_classes: int = 0  # 0: not classified
    errors: Mapping[str, int] = field(default_factory=dict)  # images that were not read, by kind
    accuracy: Mapping[int, Mapping[int, Estimate]] = field(default_factory=dict)  # patch -> k
    recall: Mapping[int, Recall] = field(default_factory=dict)  # patch ->
    class_recall: Mapping[int, Estimate] = field(default_factory=dict)  # patch -> mean over classes
    left_out: int = 0  # images that the set's protocol does not score
    empty_classes: int = 0  # that have names and no images
    uncaptioned: int = 0  # images that recall, which was asked for, leaves out

    def figures(self) -> dict[str, float]:
        """All shares by name, `pets/p28/top1`, and how many images were not read."""
        found: dict[str, float] = {}
        for size, by_k in self.accuracy.items():
            found |= {f"p{size}/top{k}": e.value for k, e in by_k.items()}
        found |= {f"p{size}/per_class": e.value for size, e in self.class_recall.items()}
        for size, recall in self.recall.items():
            for way in ("image_to_text", "text_to_image"):
                by_k = getattr(recall, way)
                found |= {f"p{size}/{way}/recall{k}": e.value for k, e in by_k.items()}
        not_read = {"not_read": float(sum(self.errors.values()))} if self.errors else {}
        return {f"{self.name}/{name}": value for name, value in (found | not_read).items()}


def measure_costs(
    model: LitModel, patch_sizes: Sequence[int], batch_size: int = 32, repeats: int = 5
) -> list[PatchCost]:
    """Tokens, GFLOPs and measured speed of the image tower, one batch of random pixels at a time.

    The repeats of the patch sizes are interleaved, so a machine that slows down slows all alike.
    """
    side = model.image_size
    pixels = torch.randn(batch_size, 3, side, side, device=model.device)
    speeds: dict[int, list[float]] = {size: [] for size in patch_sizes}
    order = [size for _ in range(repeats) for size in patch_sizes]
    for size in patch_sizes:
        model.encode_image(pixels[: max(1, batch_size // 4)], patch_size=size)  # warm up
    for size in tqdm(order, desc="timing the tower", leave=False, disable=not is_main()):
        _synchronize(model.device)
        start = time.perf_counter()
        model.encode_image(pixels, patch_size=size)
        _synchronize(model.device)
        speeds[size].append(batch_size / (time.perf_counter() - start))
    return [
        PatchCost(
            size,
            model.vision.num_tokens(size),
            model.vision.gflops(size),
            (statistics.median(speeds[size]), min(speeds[size]), max(speeds[size])),
        )
        for size in patch_sizes
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Report:
    """Costs and results of one model; prints as text, Markdown, JSON and a plot."""

    model: str
    costs: Sequence[PatchCost]
    datasets: Sequence[DatasetResult]

    # ---- tables ----------------------------------------------------------------------------

    def _cost_columns(self) -> list[Column]:
        costs = self.costs
        speeds = [c.images_per_second[0] for c in costs]
        return [
            Column("", "patch", [f"{c.patch_size}" for c in costs]),
            Column("", "tokens", [f"{c.tokens}" for c in costs]),
            Column("", "GFLOPs", [f"{c.gflops:.3g}" for c in costs]),
            Column("", "images/s", [f"{s:,.0f}" if s >= 10 else f"{s:.1f}" for s in speeds]),
        ]

    def _accuracy_columns(self) -> list[Column]:
        sizes = [c.patch_size for c in self.costs]
        columns = []
        for d in self.datasets:
            for k in d.accuracy[sizes[0]] if d.accuracy else ():
                column = [d.accuracy[size][k] for size in sizes]
                columns.append(Column(d.name, f"top-{k}", [e.percent() for e in column]))
                if k == 1 and column[0].interval:
                    columns.append(Column(d.name, "95%", [e.percent_interval() for e in column]))
            if d.class_recall:
                cells = [d.class_recall[size].percent() for size in sizes]
                columns.append(Column(d.name, "per class", cells))
        return columns

    def _recall_columns(self, dataset: DatasetResult) -> list[Column]:
        sizes = [c.patch_size for c in self.costs]
        ways = (("image to text", "image_to_text"), ("text to image", "text_to_image"))
        return [
            Column(title, f"R@{k}", [getattr(dataset.recall[s], way)[k].percent() for s in sizes])
            for title, way in ways
            for k in getattr(dataset.recall[sizes[0]], way)
        ]

    def _tables(self) -> list[tuple[str, list[Column]]]:
        """(title, columns) of every table: costs with accuracy, then recall per dataset."""
        tables = [("", self._cost_columns() + self._accuracy_columns())]
        tables += [
            (f"Recall, {d.name}", self._cost_columns()[:1] + self._recall_columns(d))
            for d in self.datasets
            if d.recall
        ]
        return tables

    def _notes(self) -> list[str]:
        notes = ["Accuracy and recall in per cent, ± one standard error with each class a cluster."]
        if any(d.class_recall for d in self.datasets):
            notes.append(
                "95%: of top-1, percentiles of 2,000 bootstrap samples of whole classes. "
                "per class: mean per-class recall."
            )
        notes.append("GFLOPs (2 x multiply-adds) and images/s are of the image tower, per image.")
        for d in self.datasets:
            note = f"{d.name}: {d.num_images:,} images"
            if d.num_classes:
                note += f", {d.num_classes:,} classes (chance {100 / d.num_classes:.2g}%)"
            if d.empty_classes:
                note += f", {d.empty_classes:,} of them without images"
            if d.left_out:
                note += f"; left out, as its protocol wants it: {d.left_out:,}"
            if d.uncaptioned:
                note += f"; without captions, so not in the recall: {d.uncaptioned:,}"
            if d.errors:
                kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(d.errors.items()))
                note += f"; not read: {kinds}"
            notes.append(note + ".")
        return notes

    def text(self) -> str:
        """Fixed-width tables for a terminal."""
        blocks = []
        for title, columns in self._tables():
            blocks.append((f"{title}\n" if title else "") + fixed_width(columns))
        return "\n\n".join([*blocks, "\n".join(self._notes())])

    def markdown(self) -> str:
        """The same tables for a page."""
        blocks = [f"# {self.model}"]
        for title, columns in self._tables():
            heads = [f"{c.group} {c.head}".strip() for c in columns]
            rows = [heads, ["---:"] * len(heads)]
            rows += [list(row) for row in zip(*(c.cells for c in columns), strict=True)]
            table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            blocks.append((f"## {title}\n\n" if title else "") + table)
        return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in self._notes())]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; shares in [0, 1], nan as None."""
        return {
            "format": 1,
            "model": self.model,
            "machine": {
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in ("torch", "timm", "faiss-gpu")},
            },
            "patch_sizes": [
                {
                    "patch_size": c.patch_size,
                    "tokens": c.tokens,
                    "gflops": c.gflops,
                    "images_per_second": dict(
                        zip(("median", "min", "max"), c.images_per_second, strict=True)
                    ),
                }
                for c in self.costs
            ],
            "datasets": [
                {
                    "name": d.name,
                    "num_images": d.num_images,
                    "num_classes": d.num_classes,
                    "errors": dict(d.errors),
                    "left_out": d.left_out,
                    "empty_classes": d.empty_classes,
                    "uncaptioned": d.uncaptioned,
                    "accuracy": {
                        str(size): _plain(by_k, "top") for size, by_k in d.accuracy.items()
                    },
                    "mean_per_class_recall": {
                        str(size): _plain_estimate(e) for size, e in d.class_recall.items()
                    },
                    "recall": {
                        str(size): {
                            "image_to_text": _plain(recall.image_to_text, "recall"),
                            "text_to_image": _plain(recall.text_to_image, "recall"),
                        }
                        for size, recall in d.recall.items()
                    },
                }
                for d in self.datasets
            ],
        }

    # ---- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.md, report.txt and accuracy.png (where anything was
        classified) into `folder`; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "report.json": json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n",
            "report.md": self.markdown(),
            "report.txt": self.text() + "\n",
        }
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
        files = [folder / name for name in contents]
        if any(d.accuracy for d in self.datasets):
            files.append(self.plot(folder / "accuracy.png"))
        return files

    def plot(self, path: str | Path) -> Path:
        """Top-1 accuracy against GFLOPs per image, a line per dataset, one standard error as bars.

        Raises `UsageError` without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import FuncFormatter, NullLocator
        except ImportError as error:
            raise UsageError("a plot needs matplotlib; pip install matplotlib") from error

        costs = sorted(self.costs, key=lambda c: c.gflops)
        gflops = [c.gflops for c in costs]
        figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        colours = ["#0b62a4", "#d1495b", "#2e8b57", "#8a5fbf", "#c98a1b", "#4a4a4a"]
        markers = "osD^vP"
        for number, dataset in enumerate(d for d in self.datasets if d.accuracy):
            points = [dataset.accuracy[c.patch_size] for c in costs]
            best = [next(iter(by_k.values())) for by_k in points]
            errors = [100 * e.standard_error for e in best]
            axes.errorbar(
                gflops,
                [100 * e.value for e in best],
                yerr=[0.0 if math.isnan(e) else e for e in errors],
                label=f"{dataset.name} ({dataset.num_classes:,} classes)",
                color=colours[number % len(colours)],
                marker=markers[number % len(markers)],
                markersize=5.5,
                linewidth=1.8,
                capsize=3,
                elinewidth=1.2,
            )
        axes.set_xscale("log")
        axes.set_xticks(gflops, [f"{g:.2g}" for g in gflops])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("GFLOPs per image (image tower, log scale)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}%"))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.06, y=0.12)
        axes.set_ylabel("zero-shot top-1 accuracy")
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        top = axes.secondary_xaxis("top")
        top.set_xticks(gflops, [f"{c.patch_size}" for c in costs])
        top.xaxis.set_minor_locator(NullLocator())
        top.set_xlabel("patch size (pixels)")
        top.spines["top"].set_visible(False)
        top.tick_params(length=0)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path)
        return Path(path)


def _plain(estimates: Mapping[int, Estimate], name: str) -> dict[str, dict[str, Any]]:
    return {f"{name}{k}": _plain_estimate(e) for k, e in estimates.items()}


def _plain_estimate(estimate: Estimate) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    plain: dict[str, Any] = {
        "value": number(estimate.value),
        "standard_error": number(estimate.standard_error),
    }
    if estimate.interval:
        plain["interval_95"] = list(estimate.interval)
    return plain
