"""Two ranks share the images of every kind of set and give one process's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluate_program import results
from forked import ranks
from launcher import ROOT
from PIL import Image
from shard_maker import png
from test_retrieval_sets import captions_of, write_images
from tree_maker import write_karpathy

from contrastive.model.lit import LitModel
from data.class_names import write_class_names
from data.scenes.build import run_lengths


def write_folders(root: Path) -> None:
    """Three classes of 7, 4 and 2 pictures, one of which is none."""
    for number, (name, count) in enumerate({"cat": 7, "dog": 4, "sun": 2}.items()):
        (root / name).mkdir(parents=True)
        for n in range(count):
            (root / name / f"{n}.png").write_bytes(png(100 * number + n))
    (root / "dog/2.png").write_bytes(b"no picture")


def write_scenes(root: Path) -> Path:
    """Five pictures of a red or green square on grey, a crowd among them; one has no mask."""
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "grey": (128, 128, 128)}
    annotations, images = [], []
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(5):
        mask = np.full((48, 48), 3, np.uint8)
        side, label = 20 + 4 * number, 1 + number % 2
        mask[2 : 2 + side, 4 : 4 + side] = label
        pixels = np.array([(0, 0, 0), *colours.values()], np.uint8)[mask]
        Image.fromarray(pixels).save(root / f"images/{number}.png")
        if number != 3:
            Image.fromarray(mask).save(root / f"masks/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 48})
        for which, box in ((label, [4, 2, side, side]), (3, [0, 0, 48, 48])):
            runs = {"size": [48, 48], "counts": run_lengths(mask == which)}
            crowd = int(number == 4 and which == label)
            annotations.append(
                {"image_id": number, "category_id": which, "bbox": box, "segmentation": runs,
                 "iscrowd": crowd}
            )  # fmt: skip
    categories = [{"id": label, "name": name} for label, name in enumerate(colours, 1)]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(found))
    write_class_names(root, colours, ["a {c} square"])
    return root


def test_two_ranks_match_one_process(
    tmp_path: Path, tiny_model: LitModel, model_dir: Path, emoji_shards: Path
) -> None:
    write_folders(tmp_path / "pictures")
    names = [f"{n}.jpg" for n in range(11)]
    write_images(tmp_path / "images", names)
    write_karpathy(tmp_path, "flickr30k", {n: captions_of(i) for i, n in enumerate(names)}, "test")
    job = {
        "model": str(model_dir),
        "out": str(tmp_path / "out.json"),
        "dense": [str(write_scenes(tmp_path / "scenes"))],
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
    assert of_two["results"]["scenes"] == of_one["scenes"]
    assert (of_one["scenes"]["num_images"], of_one["scenes"]["errors"]) == (4, {"no_mask": 1})
    assert of_one["scenes"]["noted"] == {"crowd": 1}
    shares = of_one["scenes"]["dense"]["48"]
    assert 0 < shares["miou"] < shares["pixel_accuracy"] < 1
    assert all(0 < shares[name] < 1 for name in ("ap50", "pq"))
    errors = [[d.pop("calibration") for d in r.values()] for r in (of_two["results"], of_one)]
    assert of_two["results"] == of_one
    for two, one in zip(*errors, strict=True):  # features of other batches differ in rounding
        assert {size: pytest.approx(error, abs=2e-4) for size, error in one.items()} == two
    assert of_one["pictures"]["errors"] == {"not_an_image": 1}
    assert of_one["pictures"]["num_images"] == 12
    assert set(of_one["flickr30k"]["recall"]) == {"48", "40"}
    assert of_one["heldout_captions"]["accuracy"]["48"]["top1"]["value"] is not None
