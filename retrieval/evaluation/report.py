"""The report of an evaluation: per patch size, what it costs and what it gives."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.files import write_text_atomically
from data.numbers import rounded
from retrieval.detail import MaxTokens, said
from retrieval.evaluation.costs import PatchCost
from retrieval.evaluation.plot import plot_accuracy, plot_dense
from retrieval.evaluation.report_json import report_json
from retrieval.evaluation.results import DatasetResult

DENSE = {
    "miou": "mIoU", "pixel_accuracy": "pixels", "ap50": "AP50", "ap": "AP", "pq": "PQ", "sq": "SQ",
    "rq": "RQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff",
}  # fmt: skip
"""What a set with masks or boxes is measured by -> the heading."""

DENSE_NOTE = (
    "In per cent: mean IoU over classes and the share of right pixels; AP of boxes as COCO has it "
    "(mean over overlaps of 0.5 to 0.95); PQ, panoptic quality."
)


@dataclass(frozen=True)
class Column:
    """A column of a table; neighbours of one group stand under its name."""

    group: str
    head: str
    cells: list[str]


@dataclass(frozen=True)
class Report:
    """Costs and results of one model; prints as text, Markdown, JSON and a plot."""

    model: str
    costs: Sequence[PatchCost]
    results: Sequence[DatasetResult]

    # ---- tables ----------------------------------------------------------------------------

    def _cost_columns(self) -> list[Column]:
        costs = self.costs
        speeds = [c.images_per_second[0] for c in costs]
        return [
            *self._size_columns(),
            Column("", "tokens", [f"{c.tokens}" for c in costs]),
            Column("", "GFLOPs", [rounded(c.gflops, 3) for c in costs]),
            Column("", "images/s", [f"{s:,.0f}" if s >= 10 else f"{s:.1f}" for s in speeds]),
        ]

    def _size_columns(self) -> list[Column]:
        sizes = [c.patch_size for c in self.costs]
        if all(isinstance(size, MaxTokens) for size in sizes):
            return [Column("", "at most", [str(size) for size in sizes])]
        return [Column("", "patch", [f"{size}" for size in sizes])]

    def _accuracy_columns(self) -> list[Column]:
        sizes = [c.patch_size for c in self.costs]
        columns = []
        for d in self.results:
            for k in d.accuracy[sizes[0]] if d.accuracy else ():
                column = [d.accuracy[size][k] for size in sizes]
                columns.append(Column(d.name, f"top-{k}", [e.percent() for e in column]))
                if k == 1 and column[0].interval:
                    columns.append(Column(d.name, "95%", [e.percent_interval() for e in column]))
            if d.dense:
                columns += [
                    Column(d.name, head, [_percent(getattr(d.dense[size], what)) for size in sizes])
                    for what, head in DENSE.items()
                    if getattr(d.dense[sizes[0]], what) is not None
                ]
            if d.class_recall:
                cells = [d.class_recall[size].percent() for size in sizes]
                columns.append(Column(d.name, "per class", cells))
            if d.calibration:
                errors = [d.calibration[size] for size in sizes]
                columns.append(Column(d.name, "ECE", [f"{100 * e.final:.1f}" for e in errors]))
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
        """(title, columns) of every table: costs with accuracy, then recall per data set."""
        tables = [("", self._cost_columns() + self._accuracy_columns())]
        tables += [
            (f"Recall, {d.name}", self._size_columns() + self._recall_columns(d))
            for d in self.results
            if d.recall
        ]
        return tables

    def _notes(self) -> list[str]:
        notes = []
        if any(d.accuracy or d.recall for d in self.results):
            notes.append(
                "Accuracy and recall in per cent, ± one standard error with each class a cluster."
            )
        if any(d.dense for d in self.results):
            notes.append(DENSE_NOTE)
        if any(d.class_recall for d in self.results):
            notes.append(
                "95%: of top-1, percentiles of 2,000 bootstrap samples of whole classes. "
                "per class: mean per-class recall."
            )
        notes.append("GFLOPs (2 x multiply-adds) and images/s are of the image tower, per image.")
        if any(isinstance(c.patch_size, MaxTokens) for c in self.costs):
            notes.append("At most so many patches an image; tokens and costs are a square's.")
        for d in self.results:
            note = f"{d.name}: {d.num_images:,} images"
            if d.num_classes:
                note += f", {d.num_classes:,} classes"
            if d.accuracy:
                note += f" (chance {rounded(100 / d.num_classes, 2)}%)"
            if d.empty_classes:
                note += f", {d.empty_classes:,} of them without images"
            if d.left_out:
                note += f"; left out, as its protocol says: {d.left_out:,}"
            if d.uncaptioned:
                note += f"; without captions, so not in the recall: {d.uncaptioned:,}"
            if d.errors:
                kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(d.errors.items()))
                note += f"; not read: {kinds}"
            if d.noted:
                kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(d.noted.items()))
                note += f"; in its annotations: {kinds}"
            if d.remark:
                note += f"; {d.remark}"
            notes += [*_calibration_note(d), note + "."]
        return notes

    def text(self) -> str:
        """Tables of aligned columns, for a terminal."""
        blocks = []
        for title, columns in self._tables():
            blocks.append((f"{title}\n" if title else "") + text_table(columns))
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

    def tell(self, folder: str | Path = "") -> None:
        """Print the text, then the files that `save` writes where there is a folder."""
        print(self.text())
        for file in self.save(folder) if folder else []:
            print(file)

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.md, report.txt, and accuracy.png or dense.png (of what was
        classified, of masks and boxes) into `folder`; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "report.json": json.dumps(
                report_json(self.model, self.costs, self.results), indent=2, allow_nan=False
            )
            + "\n",
            "report.md": self.markdown(),
            "report.txt": self.text() + "\n",
        }
        for name, content in contents.items():
            write_text_atomically(folder / name, content)
        files = [folder / name for name in contents]
        if any(d.accuracy for d in self.results):
            files.append(plot_accuracy(self.costs, self.results, folder / "accuracy.png"))
        if any(d.dense for d in self.results):
            files.append(plot_dense(self.costs, self.results, folder / "dense.png"))
        return files


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _calibration_note(found: DatasetResult) -> list[str]:
    """What the calibration error is of, with what temperatures, and what chance alone gives."""
    errors = found.calibration
    if not errors:
        return []
    one = next(iter(errors.values()))
    chance = ", ".join(f"{100 * e.chance:.1f}" for e in errors.values())
    note = (
        f"{found.name}: ECE is the expected calibration error of the first class in per cent, of "
        f"{one.images:,} images in 15 bins of equal width; chance alone gives {chance}."
    )
    fitted = [f"{e.temperature:.2f} at {said(s)}" for s, e in errors.items() if e.temperature]
    if fitted:
        before = ", ".join(f"{100 * e.ece:.1f}" for e in errors.values())
        note += (
            f" Temperatures were fitted on {one.examples:,} others ({', '.join(fitted)}); without "
            f"them it is {before}."
        )
    return [note]


def text_table(columns: Sequence[Column]) -> str:
    """Right-aligned columns under their headings; a group's name stands over its first column. No
    colour, and the same at any terminal width."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    group = ""
    for column in columns:
        first = column.group if column.group != group else ""
        group = column.group
        lines = [first, column.head] if any(c.group for c in columns) else [column.head]
        table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
