"""Evaluation over the default data equals what its parts give one by one."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_maker import png, write_tar

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.problems import SampleError
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.evaluation.datasets import load_dataset
from retrieval.evaluation.evaluate import evaluate
from retrieval.evaluation.metrics import caption_pairs, recall_at_k, topk_accuracy
from retrieval.evaluation.report import Report

LAUNCH = Path(__file__).parents[1] / "launch"


def test_one_pass_equals_the_parts_one_by_one(tiny_model: LitModel, emoji_shards: Path) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions", "held out")
    sizes = tiny_model.patch_sizes[:2]
    result = evaluate(tiny_model, dataset, sizes, recall=True, batch_size=5, num_workers=0)
    (images, targets, captions) = ([], [], [])
    for batch in dataset.reader(tiny_model.transform, num_workers=0):
        images.append(batch.images)
        targets += batch.labels.tolist()
        captions += batch.captions
    pixels = tiny_model.transform.normalise(torch.cat(images))
    assert result.num_images == len(pixels) == dataset.num_images()
    texts, pairs = caption_pairs(captions)
    classifier = ZeroShotClassifier(tiny_model, dataset.class_names, dataset.templates)
    for size in sizes:
        embeds = tiny_model.encode_image(pixels, patch_size=size).numpy()
        labels, _ = classifier.classify_embeddings(embeds)
        assert result.accuracy[size] == topk_accuracy(labels, np.array(targets))
        recall = recall_at_k(embeds, tiny_model.encode_text(texts).numpy(), pairs)
        assert result.recall[size] == recall


def test_label_outside_the_class_names_is_refused(tiny_model: LitModel, emoji_shards: Path) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions")
    short = replace(dataset, class_names=dataset.class_names[:2])
    with pytest.raises(UsageError, match="allowed: 0 to 1"):
        evaluate(tiny_model, short, tiny_model.patch_sizes[:1], num_workers=0)


def test_a_label_that_is_no_class_number_is_counted_and_a_missing_one_named(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    size = tiny_model.patch_sizes[:1]
    root = write_drawings(tmp_path / "set", 0)
    members = []
    for n, label in enumerate([b"0", b"cat", b"1.0", b"", b"-1", b"2"]):
        members += [(f"{n}.png", png(n)), (f"{n}.cls", label)]
    write_tar(root / "0.tar", members)
    dataset = load_dataset("shards", root)
    result = evaluate(tiny_model, dataset, size, num_workers=0)
    assert (result.num_images, result.errors) == (2, {"bad_label": 4})
    with pytest.raises(SampleError, match=r"'1'.*b'cat' is no class number"):
        evaluate(tiny_model, dataset, size, num_workers=0, on_error="raise")
    write_tar(root / "0.tar", [*members, ("9.png", png(9))])
    with pytest.raises(UsageError, match=r"sample '9' has no \.cls; allowed: 0 to 2"):
        evaluate(tiny_model, dataset, size, num_workers=0)


def test_captions_alone_give_recall_alone(tiny_model: LitModel, emoji_shards: Path) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions")
    unnamed = replace(dataset, class_names=(), templates=())
    size = tiny_model.patch_sizes[0]
    result = evaluate(tiny_model, unnamed, [size], recall=True, num_workers=0)
    assert not result.accuracy
    assert set(result.recall) == {size}
    assert not evaluate(tiny_model, unnamed, [size], num_workers=0).recall


def write_drawings(root: Path, captioned: int) -> Path:
    """Shards of 16 drawings with labels, the last ones without captions."""
    members = []
    for n in range(16):
        members += [(f"{n:03d}.png", png(n)), (f"{n:03d}.cls", str(n % 3).encode())]
        members += [(f"{n:03d}.txt", f"number {n}".encode())] if n < captioned else []
    root.mkdir()
    write_tar(root / "0.tar", members)
    (root / "classnames.txt").write_text("cat\ndog\nsun\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    return root


def test_images_without_a_caption_count_for_the_accuracy_alone(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    dataset = load_dataset("shards", write_drawings(tmp_path / "set", 12))
    whole = evaluate(tiny_model, dataset, [48], recall=True, num_workers=0)
    assert whole.accuracy == evaluate(tiny_model, dataset, [48], num_workers=0).accuracy
    assert (whole.num_images, whole.uncaptioned, whole.errors) == (16, 4, {})
    unnamed = replace(dataset, class_names=(), templates=())
    captioned = evaluate(tiny_model, unnamed, [48], recall=True, num_workers=0)
    assert captioned.num_images == 12
    assert whole.recall == captioned.recall
    assert "not in the recall: 4." in Report("", [], [whole])._notes()[-1]


def test_where_no_image_has_a_caption_recall_is_left_out_or_refused(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    dataset = load_dataset("shards", write_drawings(tmp_path / "set", 0))
    result = evaluate(tiny_model, dataset, [48], recall=True, num_workers=0)
    assert not result.recall
    assert (set(result.accuracy), result.uncaptioned) == ({48}, 16)
    root = tmp_path / "pictures"
    (root / "cat").mkdir(parents=True)
    (root / "cat/0.png").write_bytes(b"not read")
    with pytest.raises(UsageError, match="recall needs captions, and no image of pictures has"):
        evaluate(tiny_model, load_dataset("folder", root), [48], recall=True, num_workers=0)


def run_zeroshot(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run launch/zeroshot.py in this process up to its exit with status 2."""
    monkeypatch.setattr(sys, "argv", ["zeroshot.py", "--num-workers", "0", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCH / "zeroshot.py"), run_name="__main__")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--out", __file__], f"--out {__file__} cannot be a folder: File exists"),
        (["--recall"], "--recall needs captions, and no image of pictures has any"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_read(
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "pictures"
    (root / "cat").mkdir(parents=True)
    (root / "cat/0.png").write_bytes(png(0))
    required = ["--model", "none", "--dataset", "folder", "--root", str(root)]
    run_zeroshot(monkeypatch, *required, *flags)
    assert sentence in capsys.readouterr().err


def test_a_set_that_cannot_be_read_costs_no_result_before_it(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = write_drawings(tmp_path / "good", 0)
    bad = write_drawings(tmp_path / "bad", 0)
    write_tar(bad / "0.tar", [("0.png", b"no picture"), ("0.cls", b"0")])
    required = ["--model", str(model_dir), "--root", str(good), str(bad)]
    flags = ["--patch-sizes", "48", "--out", str(tmp_path / "report")]
    run_zeroshot(monkeypatch, *required, *flags)
    said = capsys.readouterr()
    assert "good: 16 images" in said.out
    assert "bad has no image that can be read" in said.err
    saved = json.loads((tmp_path / "report/report.json").read_text())
    assert [dataset["name"] for dataset in saved["datasets"]] == ["good"]


def test_command_line_prints_the_table_and_writes_the_report(
    tiny_model: LitModel,
    model_dir: Path,
    emoji_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size, out = tiny_model.patch_sizes[0], tmp_path / "report"
    arguments = ["--model", str(model_dir), "--dataset", "shards", "--out", str(out)]
    arguments += ["--root", str(emoji_shards / "heldout_captions"), "--num-workers", "0"]
    script = str(LAUNCH / "zeroshot.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--patch-sizes", str(size)])
    runpy.run_path(script, run_name="__main__")
    assert "heldout_captions" in capsys.readouterr().out
    saved = json.loads((out / "report.json").read_text())
    assert [row["patch_size"] for row in saved["patch_sizes"]] == [size]
    assert (out / "accuracy.png").is_file()
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--patch-sizes", "31"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 2
    assert "patch size 31" in capsys.readouterr().err
