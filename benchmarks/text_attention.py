"""Plain against fused attention in a text tower's training step, on a CPU.

    python benchmarks/text_attention.py

MiniLM-L6, 256 texts of 8, 16 and 32 tokens: forward and backward, in turn. A ratio is the fused
attention's median time over the plain one's; it is why `HFTextTower` takes the plain one in
bfloat16.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.text.padding import PaddedTokens, TokenBatch
from lib.harness import finish, interleave
from lib.lit_setup import CPU, text_folder

TEXTS = 256
LENGTHS = (8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = text_folder(CPU, Path(folder) / "text")
        encoder = TextEncoder(load_text_tower(TextConfig(tower=f"hf:{text}")), 384).train()
    tower: Any = encoder.tower
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            ids = torch.randint(1000, 2000, (TEXTS, length))
            tokens = TokenBatch((PaddedTokens(ids, torch.ones_like(ids)),), TEXTS)

            def step(
                attention: str, tokens: TokenBatch = tokens, dtype: torch.dtype = dtype
            ) -> None:
                tower.net.set_attn_implementation(attention)
                tower._choose_attention = lambda: None
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    embeds = encoder(tokens)
                encoder.zero_grad()
                embeds.sum().backward()

            timings = interleave(
                {"plain": partial(step, "eager"), "fused": partial(step, "sdpa")}, args.rounds
            )
            name = f"{str(dtype).removeprefix('torch.')}, {length} tokens"
            figures[name] = timings.figures() | {
                "fused_over_plain": timings.ratio("fused", "plain"),
                "rounds": [round(r, 3) for r in sorted(timings.round_ratios("fused", "plain"))],
            }
            print(name, figures[name]["fused_over_plain"], flush=True)
    finish("text_attention", figures, [], packages=("torch", "transformers"), where="cpu")


if __name__ == "__main__":
    main()
