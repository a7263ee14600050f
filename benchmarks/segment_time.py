"""How long a map by words takes, in Python and over HTTP, at five patch sizes.

    python benchmarks/segment_time.py        # after make demo, a minute

A picture of 640 x 480 px and 20 labels whose texts are encoded once, as an application would ask.
`predict` gives the mask at the picture's own resolution; /v1/segment decodes the JPEG, makes the
same mask and sends it as a PNG, one request after another by one client.
"""

import argparse
import base64
import http.client
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from contrastive import LitModel
from lib.harness import Target, finish, interleave
from lib.synthetic_index import serving
from retrieval import ZeroShotSegmenter

SIZES = (56, 32, 28, 16, 14)
LABELS = [
    *("cat", "dog", "house", "tree", "river", "bicycle", "mountain", "bridge", "train", "car"),
    *("apple", "chair", "table", "cup", "book", "shoe", "hat", "boat", "bird", "grass"),
]


def picture() -> Image.Image:
    """Smooth noise, 640 x 480 px."""
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    return Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)


def ask(port: int, patch_size: int, jpeg: str) -> None:
    body = json.dumps({"image": jpeg, "labels": LABELS, "patch_size": patch_size})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/segment", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise SystemExit(f"the server answered {answer.status} {said[:200]!r}")
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, default=Path("runs/index"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    file, image = io.BytesIO(), picture()
    image.save(file, "JPEG", quality=90)
    jpeg = base64.b64encode(file.getvalue()).decode()
    segmenter = ZeroShotSegmenter(LitModel.from_pretrained(args.index / "model"), LABELS)
    offered = segmenter.model.patch_sizes
    python = interleave(
        {str(size): partial(segmenter.predict, image, size) for size in SIZES}, args.rounds
    )
    with serving(args.index) as (port, _):
        over_http = interleave(
            {str(size): partial(ask, port, size, jpeg) for size in SIZES}, args.rounds
        )
    figures = {
        "picture": "640 x 480 px",
        "labels": len(LABELS),
        "patch_sizes_of_the_model": list(offered),
        "predict": python.figures(),
        "/v1/segment": over_http.figures(),
    }
    targets = [
        Target("ms of a mask at patch 14", "<= 150", round(1000 * python.median("14"), 1)),
        Target("ms of /v1/segment at patch 14", "<= 300", round(1000 * over_http.median("14"), 1)),
    ]
    finish("segment_time", figures, targets)


if __name__ == "__main__":
    main()
