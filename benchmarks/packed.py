"""What it costs that pictures differ in shape and budget: packed, against squares of one size.

    python benchmarks/packed.py [--model runs/demo/model] [--rounds 5]

Service: the 32 pictures that 32 clients wait for at once, four aspect ratios at five budgets of
tokens, pixels ready: packed as `LitModel.encode_image` does it, grouped by shape, and padded to the
longest with a mask (in sequences of as many tokens as packed ones); against 32 squares of about as
many tokens each. Album: photographs at 64 tokens, `aspect` (each its own shape) against `crop`
(squares), with resizing. Throughput is patches per CPU second of one thread, which other programs
on the machine disturb little; contenders run in turn. Vectors are compared with those that each
picture has alone.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from contrastive import LitModel
from contrastive.model.shaped import (
    MAX_PACKED,
    ShapedPixels,
    by_shape,
    grid_of,
    shaped_features,
    shaped_pixels,
)
from contrastive.vision.tower import VisionTower
from lib.harness import Target, Timings, finish, interleave
from lib.mixed_shapes import draw_requests, grouped, num_patches, squares
from lib.shaped_sets import photographs

CLIENTS = 32
ALBUM, ALBUM_TOKENS = 64, 64


@torch.no_grad()
def padded(tower: VisionTower, images: list[ShapedPixels]) -> None:
    """Sequences of like length padded to the longest, whose padding no token attends to."""
    images, start = sorted(images, key=num_patches), 0
    while start < len(images):
        end = start + 1
        while (
            end < len(images) and num_patches(images[end]) * (end - start + 1) <= MAX_PACKED["cpu"]
        ):
            end += 1
        rows = []
        for patch_size, _, pixels in by_shape(images[start:end]):
            assert patch_size is not None
            rows += list(tower.embed_patches(pixels, patch_size))
        longest = max(len(row) for row in rows)
        tokens = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
        for block in tower.net.blocks:
            tokens = block(tokens, attn_mask=mask)
        tower.pool(tower.net.norm(tokens))
        start = end


def service(model: LitModel, rounds: int) -> tuple[dict[str, Any], float]:
    """Figures, and the throughput of packed requests over that of squares."""
    tower = model.vision
    mixed = draw_requests(tower, CLIENTS)
    same = squares(tower, mixed)

    @torch.no_grad()
    def packed(images: list[ShapedPixels]) -> Tensor:
        return shaped_features(tower, images)

    contenders: dict[str, Any] = {
        "one shape": lambda: packed(same),
        "packed": lambda: packed(mixed),
    }
    contenders |= {"grouped": lambda: grouped(tower, mixed), "padded": lambda: padded(tower, mixed)}
    timings = interleave(contenders, rounds, warmup=1, clock=time.process_time)
    patches = {name: sum(map(num_patches, mixed)) for name in contenders}
    patches["one shape"] = sum(map(num_patches, same))
    alone = torch.cat([packed([image]) for image in mixed])
    off = model.embed_features(packed(mixed)) - model.embed_features(alone)
    figures = {
        "requests": CLIENTS,
        "shapes": len(list(by_shape(mixed))),
        "patches": patches,
        "largest_difference_from_alone": float(off.abs().max()),
        **throughput(timings, patches, "one shape"),
    }
    return figures, figures["over one shape"]["packed"]["ratio"]


def album(
    model: LitModel, pictures: list[Image.Image], rounds: int
) -> tuple[dict[str, Any], float]:
    """Figures, and the throughput of pictures as they are over that of their crops."""
    tower = model.vision

    def embed(fit: Any) -> Tensor:
        tower.use_transform(fit=fit)
        return model.encode_image(pictures, max_tokens=ALBUM_TOKENS)

    contenders = {"squares": lambda: embed("crop"), "aspect": lambda: embed("aspect")}
    timings = interleave(contenders, rounds, warmup=1, clock=time.process_time)
    patches = {}
    for name, fit in (("squares", "crop"), ("aspect", "aspect")):
        tower.use_transform(fit=fit)  # type: ignore[arg-type]
        grids = [grid_of(tower, (p.height, p.width), None, ALBUM_TOKENS) for p in pictures]
        patches[name] = sum(grid.num_tokens for grid in grids)
    shapes = len({shaped_pixels(tower, p, None, ALBUM_TOKENS).pixels.shape for p in pictures})
    figures = {
        "pictures": len(pictures),
        "shapes": shapes,
        "patches": patches,
        **throughput(timings, patches, "squares"),
    }
    return figures, figures["over squares"]["aspect"]["ratio"]


def throughput(timings: Timings, patches: dict[str, int], base: str) -> dict[str, Any]:
    """Patches per CPU second over those of `base`, and the lowest and highest of a round."""
    over = {}
    for name in patches:
        if name != base:
            scale = patches[name] / patches[base]
            ratios = [ratio * scale for ratio in timings.round_ratios(base, name)]
            ratio = timings.ratio(base, name) * scale
            over[name] = {"ratio": ratio, "rounds": [min(ratios), max(ratios)]}
    return {"timings": timings.figures(), f"over {base}": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = LitModel.from_pretrained(args.model)
    of_service, packed = service(model, args.rounds)
    print(of_service, flush=True)
    of_album, mixed = album(model, photographs(ALBUM, shaped=True).pictures, args.rounds)
    print(of_album, flush=True)
    figures = {"model": model.vision.config.name, "service": of_service, "album": of_album}
    targets = [
        Target(
            f"patches per second of {CLIENTS} pictures of four aspect ratios and five budgets, "
            "over one shape",
            ">= 0.9",
            packed,
        ),
        Target("patches per second of an album of mixed shapes, over squares", ">= 0.95", mixed),
        Target(
            "largest difference of an embedding from that of its picture alone",
            "<= 1e-5",
            of_service["largest_difference_from_alone"],
        ),
    ]
    finish("packed", figures, targets)


if __name__ == "__main__":
    main()
