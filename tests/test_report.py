"""The table per patch size: nothing gets lost on the way to text, JSON and plot."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from contrastive.model.lit import LitModel
from data.numbers import rounded
from retrieval.evaluation.costs import PatchCost, measure_costs
from retrieval.evaluation.metrics import Estimate, Recall
from retrieval.evaluation.plot import plot_accuracy
from retrieval.evaluation.report import Report
from retrieval.evaluation.results import DatasetResult, DenseScores


@pytest.fixture
def report() -> Report:
    costs = [
        PatchCost(56, 17, 0.79, (131.0, 120.0, 140.0)),
        PatchCost(28, 65, 3.1, (41.0, 40.0, 42.0)),
    ]
    accuracy = {
        56: {1: Estimate(0.22, 0.0125), 5: Estimate(0.44, 0.013)},
        28: {1: Estimate(0.29, 0.0131), 5: Estimate(0.49, math.nan)},
    }
    recall = {size: Recall({1: Estimate(0.1, 0.01)}, {1: Estimate(0.3, 0.02)}) for size in (56, 28)}
    captions = DatasetResult("held-out captions", 987, 329, {}, accuracy, recall)
    style = DatasetResult("held-out style", 872, 1644, {"not_an_image": 2}, accuracy)
    return Report("runs/demo/model", costs, [captions, style])


def test_text_has_every_number_in_aligned_columns(report: Report) -> None:
    text = report.text()
    for part in ("22.0 ±1.2", "29.0 ±1.3", "49.0", "10.0 ±1.0", "30.0 ±2.0", "131", "0.79"):
        assert part in text
    assert "held-out style: 872 images, 1,644 classes (chance 0.061%); not read" in text
    heads, _, *rows = text.split("\n\n")[0].splitlines()[1:]
    assert {len(row) for row in rows} == {len(heads)}


def test_numbers_are_written_out(report: Report) -> None:
    one = DatasetResult("one", 5, 1, {}, {56: {1: Estimate(1.0, 0.0)}})
    text = Report("model", [PatchCost(56, 17, 1234.0, (131.0, 120.0, 140.0))], [one]).text()
    assert "(chance 100%)" in text
    assert "1234" in text
    assert "e+" not in text
    expected = ["0.061", "9.1", "14", "99", "100", "1234"]
    assert [rounded(n, 2) for n in (0.0608, 9.09, 14.3, 99.4, 99.6, 1234.0)] == expected


def test_markdown_tables_have_one_row_per_patch_size(report: Report) -> None:
    rows = [line for line in report.markdown().splitlines() if line.startswith("| ")]
    accuracy, recall = rows[:4], rows[4:]
    assert [row.split(" | ")[0] for row in accuracy] == ["| patch", "| ---:", "| 56", "| 28"]
    assert len(recall) == 4
    assert {row.count("|") for row in accuracy} == {9}


def test_saved_json_holds_values_errors_and_spread(report: Report, tmp_path) -> None:
    files = report.save(tmp_path / "out")
    assert {f.name for f in files} == {"report.json", "report.md", "report.txt", "accuracy.png"}
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["format"] == 1
    speed = saved["patch_sizes"][0]["images_per_second"]
    assert speed == {"median": 131.0, "min": 120.0, "max": 140.0}
    captions, style = saved["datasets"]
    assert captions["accuracy"]["28"]["top5"] == {"value": 0.49, "standard_error": None}
    assert captions["recall"]["56"]["text_to_image"]["recall1"]["value"] == 0.3
    assert style["errors"] == {"not_an_image": 2}


def test_plot_shows_every_accuracy_at_its_cost(report: Report, tmp_path, monkeypatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    with Image.open(plot_accuracy(report.costs, report.results, tmp_path / "plot.png")) as image:
        assert image.format == "PNG"
    (figure,) = drawn
    bars = {container.get_label(): container.lines for container in figure.axes[0].containers}
    assert set(bars) == {"held-out captions (329 classes)", "held-out style (1,644 classes)"}
    line, _, (spread,) = bars["held-out captions (329 classes)"]
    np.testing.assert_allclose(line.get_xydata(), [[0.79, 22.0], [3.1, 29.0]])
    ends = [segment[:, 1] for segment in spread.get_segments()]
    np.testing.assert_allclose(ends, [[20.75, 23.25], [27.69, 30.31]])


def test_finer_patches_cost_more(tiny_model: LitModel) -> None:
    sizes = tiny_model.patch_sizes[:3]
    costs = measure_costs(tiny_model, sizes, batch_size=4, repeats=2)
    assert [c.patch_size for c in costs] == list(sizes)
    assert [c.tokens for c in costs] == sorted({c.tokens for c in costs})
    assert [c.gflops for c in costs] == sorted({c.gflops for c in costs})
    for cost in costs:
        median, low, high = cost.images_per_second
        assert 0 < low <= median <= high


def test_masks_and_boxes_stand_beside_their_cost(report: Report, tmp_path) -> None:
    dense = {
        56: DenseScores(0.123, 0.5, (math.nan, 0.123), ap50=0.25),
        28: DenseScores(0.2, 0.625, (0.1, 0.3), ap50=math.nan),
    }
    scenes = DatasetResult("scenes", 9, 1, {"no_mask": 2}, dense=dense, noted={"crowd": 3})
    both = Report("model", report.costs, [*report.results, scenes])
    text = both.text()
    for part in ("mIoU", "12.3", "62.5", "AP50", "25.0", "scenes: 9 images, 1 classes; not read: "
                 "no_mask 2; in its annotations: crowd 3."):  # fmt: skip
        assert part in text
    assert "PQ things" not in text
    files = both.save(tmp_path / "out")
    assert [f.name for f in files[-2:]] == ["accuracy.png", "dense.png"]
    saved = json.loads((tmp_path / "out/report.json").read_text())["datasets"][2]
    assert saved["dense"]["56"] == {
        "miou": 0.123, "pixel_accuracy": 0.5, "ap50": 0.25, "iou_per_class": [None, 0.123],
    }  # fmt: skip
    assert saved["dense"]["28"]["ap50"] is None
    assert "dense" not in json.loads((tmp_path / "out/report.json").read_text())["datasets"][0]
    assert scenes.figures() == {
        "scenes/p56/miou": 0.123, "scenes/p56/pixel_accuracy": 0.5, "scenes/p56/ap50": 0.25,
        "scenes/p28/miou": 0.2, "scenes/p28/pixel_accuracy": 0.625,
        "scenes/p28/ap50": pytest.approx(math.nan, nan_ok=True), "scenes/not_read": 2.0,
    }  # fmt: skip
