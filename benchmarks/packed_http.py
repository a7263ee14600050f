"""Clients of one service ask with pictures of many shapes and budgets, or of one.

    python benchmarks/packed_http.py              # after make demo

32 connections of a second process, each sending one picture after another to /v1/search: four
aspect ratios at five budgets of tokens, or squares of about as many tokens, in turn. The service
reads whole pictures (`fit` aspect), so JPEGs are decoded and resized to grids of their own, and
what arrives together shares forwards. Throughput: patches of the pictures that were answered, per
second.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serve import CLIENTS, Connection

from contrastive.vision.grids import choose_grid
from lib.harness import Target, finish
from lib.mixed_shapes import ASPECTS, BUDGETS
from lib.synthetic_index import serving
from retrieval import index_photos

SIDE = 256  # pixels, of a square; others have as many
IMAGE_SIZE = 224
SAME = 64  # tokens, of all squares
TURNS = 5


def picture(aspect: tuple[int, int], seed: int) -> bytes:
    """A JPEG of smooth noise. aspect: height to width."""
    side = SIDE / (aspect[0] * aspect[1]) ** 0.5
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    size = (round(side * aspect[1]), round(side * aspect[0]))
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def asked(what: str) -> list[tuple[bytes, int]]:
    """Bodies, and how many patches each asks for."""
    if what == "mixed":
        pairs = list(itertools.product(ASPECTS, BUDGETS))
    else:
        pairs = [((1, 1), SAME)] * (len(ASPECTS) * len(BUDGETS))
    found = []
    for number, (aspect, budget) in enumerate(pairs):
        file = picture(aspect, number)
        with Image.open(io.BytesIO(file)) as image:
            grid = choose_grid((image.height, image.width), budget, IMAGE_SIZE, "aspect")
        body = {"image": base64.b64encode(file).decode(), "max_tokens": budget, "k": 1}
        found.append((json.dumps(body).encode(), grid.num_tokens))
    return found


async def load(port: int, what: str, seconds: float) -> dict[str, float]:
    """Patches and requests per second of all connections."""
    bodies = asked(what)
    order = np.random.default_rng(0).integers(0, len(bodies), (CLIENTS, 10_000))
    end, patches, requests = time.perf_counter() + seconds, 0, 0

    async def one(numbers: Any) -> None:
        nonlocal patches, requests
        connection = Connection(port)
        for number in numbers:
            if time.perf_counter() >= end:
                break
            body, count = bodies[number]
            await connection.ask("/v1/search", body)
            patches, requests = patches + count, requests + 1
        connection.close()

    start = time.perf_counter()
    await asyncio.gather(*map(one, order))
    took = time.perf_counter() - start
    return {"patches_per_s": round(patches / took, 1), "requests_per_s": round(requests / took, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(asyncio.run(load(int(args.load[0]), args.load[1], args.seconds))))
        return
    runs: dict[str, list[dict[str, float]]] = {"one shape": [], "mixed": []}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for number, aspect in enumerate(ASPECTS):
            (photos / f"{number}.jpg").write_bytes(picture(aspect, 100 + number))
        index = Path(folder) / "index"
        index_photos(photos, args.model, index, num_workers=0, max_tokens=BUDGETS, fit="aspect")
        with serving(index) as (port, _):
            command = [sys.executable, __file__, "--seconds", str(args.seconds), "--load"]
            for turn in range(TURNS + 1):
                for what, found in runs.items():
                    run = subprocess.run(
                        [*command, str(port), what], stdout=subprocess.PIPE, text=True, check=True
                    )
                    if turn:  # the first warms up
                        found.append(json.loads(run.stdout))
                        print(what, found[-1], flush=True)
    medians = {w: float(np.median([r["patches_per_s"] for r in f])) for w, f in runs.items()}
    ratios = [
        round(mixed["patches_per_s"] / same["patches_per_s"], 3)
        for mixed, same in zip(runs["mixed"], runs["one shape"], strict=True)
    ]
    what = f"patches per second of {CLIENTS} clients, mixed over one shape"
    ratio = round(medians["mixed"] / medians["one shape"], 3)
    figures = {"clients": CLIENTS, "runs": runs, "ratio_of_turns": ratios}
    finish("packed_http", figures, [Target(what, ">= 0.9", ratio)])


if __name__ == "__main__":
    main()
