"""What torch.compile gains: the locked tower's forward, and a text tower's forward and backward.

    python benchmarks/compile.py

A ratio is the plain time over the compiled time; `compile_s` is what it costs once per process.
"""

import copy
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from contrastive import distributed
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.padding import PaddedTokens, TokenBatch
from lib.harness import Timings, finish, interleave
from lib.lit_setup import CONTEXT, build_tower, size_here, text_folder

SIZE = size_here()
PATCH_SIZES = (56, 28, 16) if SIZE.image_size == 224 else (48, 30, 16)


def main() -> None:
    figures = {}
    for precision in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            figures[precision] = measure(precision, text_folder(SIZE, Path(folder) / "text"))
    packages = ("torch", "timm", "transformers")
    finish("compile", figures, [], packages=packages)


def measure(precision: str, text: str) -> dict:
    dtype, device = getattr(torch, precision), distributed.device()
    tower = build_tower(SIZE, dtype)
    cfg = TextConfig(tower=f"hf:{text}", context_length=CONTEXT)
    encoder = TextEncoder(load_text_tower(cfg), tower.embed_dim).to(device)
    compiled_tower, compiled_encoder = copy.deepcopy((tower, encoder))
    compiled_tower.compile_blocks()
    compiled_encoder.tower.compile_net()

    ids = torch.randint(1000, 2000, (SIZE.batch_size // 2, CONTEXT), device=device)
    tokens = TokenBatch((PaddedTokens(ids, torch.ones_like(ids)),), len(ids))
    images = torch.rand(SIZE.batch_size // 16, 3, SIZE.image_size, SIZE.image_size, device=device)
    autocast = torch.autocast(device.type, dtype, enabled=precision != "float32")

    def see(net: torch.nn.Module, patch_size: int) -> None:
        with torch.no_grad():
            net(images.to(dtype), patch_size)

    def read(net: torch.nn.Module) -> None:
        with autocast:
            embeds = net(tokens)
        embeds.sum().backward()

    start = time.perf_counter()
    for patch_size in PATCH_SIZES:
        see(compiled_tower, patch_size)
    read(compiled_encoder)
    out: dict = {"compile_s": round(time.perf_counter() - start, 1)}
    for patch_size in PATCH_SIZES:
        timings = interleave(
            {
                "plain": partial(see, tower, patch_size),
                "compiled": partial(see, compiled_tower, patch_size),
            },
            15,
        )
        out[f"image_patch_{patch_size}"] = gain(timings)
    out["text"] = gain(
        interleave({"plain": lambda: read(encoder), "compiled": lambda: read(compiled_encoder)}, 15)
    )
    return out


def gain(timings: Timings) -> dict:
    rounds = sorted(timings.round_ratios("plain", "compiled"))
    ratio = timings.ratio("plain", "compiled")
    return {"plain_over_compiled": ratio, "rounds": [round(r, 3) for r in rounds]}


if __name__ == "__main__":
    main()
