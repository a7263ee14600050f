"""Two ranks share the images of every kind of set and give one process's numbers."""

import json
from pathlib import Path

import pytest
from evaluate_program import results
from forked import ranks
from launcher import ROOT
from shard_maker import png
from test_retrieval_sets import captions_of, write_images
from tree_maker import write_karpathy

from contrastive.model.lit import LitModel


def write_folders(root: Path) -> None:
    """Three classes of 7, 4 and 2 pictures, one of which is none."""
    for number, (name, count) in enumerate({"cat": 7, "dog": 4, "sun": 2}.items()):
        (root / name).mkdir(parents=True)
        for n in range(count):
            (root / name / f"{n}.png").write_bytes(png(100 * number + n))
    (root / "dog/2.png").write_bytes(b"no picture")


def test_two_ranks_match_one_process(
    tmp_path: Path, tiny_model: LitModel, emoji_shards: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    write_folders(tmp_path / "pictures")
    names = [f"{n}.jpg" for n in range(11)]
    write_images(tmp_path / "images", names)
    write_karpathy(tmp_path, "flickr30k", {n: captions_of(i) for i, n in enumerate(names)}, "test")
    job = {
        "model": str(tmp_path / "model"),
        "out": str(tmp_path / "out.json"),
        "sets": {
            f"folder:{tmp_path / 'pictures'}": False,
            f"flickr30k:{tmp_path}": True,
            str(emoji_shards / "heldout_captions"): True,  # drawings that share their captions
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = ranks(2, ROOT / "tests/evaluate_program.py", str(tmp_path / "job.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    of_two = json.loads((tmp_path / "out.json").read_text())
    of_one = json.loads(json.dumps(results(tiny_model, job)))
    assert of_two["ranks"] == 2
    errors = [[d.pop("calibration") for d in r.values()] for r in (of_two["results"], of_one)]
    assert of_two["results"] == of_one
    for two, one in zip(*errors, strict=True):  # features of other batches differ in rounding
        assert {size: pytest.approx(error, abs=2e-4) for size, error in one.items()} == two
    assert of_one["pictures"]["errors"] == {"not_an_image": 1}
    assert of_one["pictures"]["num_images"] == 12
    assert set(of_one["flickr30k"]["recall"]) == {"48", "40"}
    assert of_one["heldout_captions"]["accuracy"]["48"]["top1"]["value"] is not None
