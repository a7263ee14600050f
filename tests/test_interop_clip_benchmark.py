"""CLIP_benchmark as published, on the exported model, gives our accuracy and recall."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_maker import write_tar
from test_export import with_text

from contrastive import load_vision_tower
from contrastive.export.export_model import export_model
from retrieval.evaluation.datasets import EvalDataset, load_dataset
from retrieval.evaluation.evaluate import evaluate

pytestmark = pytest.mark.interop

ENVIRONMENT = Path(__file__).parents[1] / ".venv-interop/clip-benchmark"


def clip_benchmark(model: Path, root: Path, task: str, out: Path) -> dict[str, float]:
    """What its command line says of the shards in `root`."""
    packages = next(ENVIRONMENT.glob("lib/python*/site-packages"), None)
    if packages is None:
        pytest.fail(f"CLIP_benchmark is not in {ENVIRONMENT}; `make interop` installs it")
    command = [sys.executable, "-m", "clip_benchmark.cli", "eval", "--dataset=wds/mine"]
    command += [f"--dataset_root={root}", f"--task={task}", f"--output={out}", "--no_amp"]
    command += [f"--model=local-dir:{model}", "--pretrained=", "--batch_size=16"]
    command += ["--num_workers=0", "--recall_k", "5"]
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(out.read_text())["metrics"]


def write_retrieval(root: Path, captioned: EvalDataset, transform) -> None:
    """The default data's drawings in CLIP_benchmark's layout. Each caption begins with its key, so
    that no two are equal: a tie at rank k falls out differently from one machine to the next."""
    members = []
    for batch in captioned.reader(transform, num_workers=0, need_captions=True):
        for row, key in enumerate(batch.keys):
            with open(captioned.shards[batch.shard], "rb") as tar:
                tar.seek(int(batch.offsets[row]))
                picture = tar.read(int(batch.sizes[row]))
            members += [(f"{key}.png", picture)]
            captions = [f"{key} {caption}" for caption in batch.captions[row]]
            members += [(f"{key}.txt", "\n".join(captions).encode())]
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("retrieval")
    (root / "test/nshards.txt").write_text("1")
    write_tar(root / "test/0.tar", members)


def test_clip_benchmark_gives_our_numbers(emoji_shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_text(load_vision_tower("dinov2s-flexi"), "minilm")
    exported = tmp_path / "exported"
    export_model(model, "open_clip", 28, exported)
    drawings = load_dataset("shards", emoji_shards / "heldout_captions")

    root = tmp_path / "classified"
    (root / "test").mkdir(parents=True)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (root / name).write_text((emoji_shards / "heldout_captions" / name).read_text())
    for number, shard in enumerate(drawings.shards):
        os.link(shard, root / f"test/{number}.tar")
    (root / "test/nshards.txt").write_text(str(len(drawings.shards)))
    theirs = clip_benchmark(exported, root, "zeroshot_classification", tmp_path / "c.json")
    ours = evaluate(model, load_dataset("shards", root), [28], num_workers=0)
    assert ours.accuracy[28][1].value == pytest.approx(theirs["acc1"], abs=1e-3)
    assert ours.accuracy[28][5].value == pytest.approx(theirs["acc5"], abs=1e-3)
    assert ours.class_recall[28].value == pytest.approx(theirs["mean_per_class_recall"], abs=1e-3)

    root = tmp_path / "retrieved"
    write_retrieval(root, drawings, model.transform)
    theirs = clip_benchmark(exported, root, "zeroshot_retrieval", tmp_path / "r.json")
    recall = evaluate(model, load_dataset("shards", root), [28], num_workers=0).recall[28]
    text = theirs["text_retrieval_recall@5"]
    image = theirs["image_retrieval_recall@5"]
    assert recall.image_to_text[5].value == pytest.approx(text, abs=1e-3)
    assert recall.text_to_image[5].value == pytest.approx(image, abs=1e-3)
