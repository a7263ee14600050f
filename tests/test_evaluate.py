"""Evaluation over the default data equals what its parts give one by one."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.lit import LitModel
from data.errors import UsageError
from retrieval.classify import ZeroShotClassifier
from retrieval.datasets import load_dataset
from retrieval.evaluate import evaluate
from retrieval.metrics import caption_pairs, recall_at_k, topk_accuracy

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
    pixels = torch.cat(images)
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


def test_captions_alone_give_recall_alone(tiny_model: LitModel, emoji_shards: Path) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions")
    unnamed = replace(dataset, class_names=(), templates=())
    size = tiny_model.patch_sizes[0]
    result = evaluate(tiny_model, unnamed, [size], recall=True, num_workers=0)
    assert not result.accuracy
    assert set(result.recall) == {size}


def test_command_line_prints_the_table_and_writes_the_report(
    tiny_model: LitModel,
    emoji_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    size, out = tiny_model.patch_sizes[0], tmp_path / "report"
    arguments = ["--model", str(tmp_path / "model"), "--dataset", "shards", "--out", str(out)]
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
