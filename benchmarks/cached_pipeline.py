"""Pairs/s of the cached pipeline alone: one process, no loader workers, captions of 16 tokens.

    python benchmarks/cached_pipeline.py
    python benchmarks/cached_pipeline.py --samples 200 --rounds 2     # a smoke test

Shards as img2dataset writes them, with one caption an image and with five, cached as training
caches them, the image features at random. Compared in turn, a few batches of 4,096 each: the cached
pipeline, the same with the look-up of features, and the pipeline that reads captions from the
shards and tokenises them, sample by sample. A batch of each is compared first: they are equal. No
thread reads ahead here, as one does in training.
"""

import argparse
import dataclasses
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.batch import Batch
from data.cache.captions import CaptionCache
from data.cache.features import FeatureCache
from data.config import DataConfig
from data.pipeline.captioned import CaptionedPipeline
from data.shards.index import load_index
from data.shards.tar import add_member
from lib.harness import Target, finish, interleave

BATCH, TOKENS, WIDTH, PATCH_SIZE = 4096, 16, 384, 16
BATCHES = 24  # of a round of the cached pipeline; of the other, 1
WANTED = {1: 400_000, 5: 250_000}  # pairs/s, by captions an image


@dataclass(frozen=True)
class Sixteen:
    """A tokenizer that costs nothing."""

    fingerprint: str = "sixteen"
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[len(text), *range(1000, 1000 + TOKENS - 1)] for text in texts]


def write_shard(path: Path, shard: int, samples: int, captions: int) -> str:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            key = f"{shard:05d}{number:04d}"
            texts = [f"caption {i} of picture {key}, one of many" for i in range(captions)]
            told = json.dumps({"captions": texts}) if captions > 1 else texts[0]
            for ext, data in (("jpg", b"x"), ("json" if captions > 1 else "txt", told.encode())):
                add_member(tar, f"{key}.{ext}", data)
    return str(path)


class Cached:
    """Shards with their caches, and the pipelines over them."""

    def __init__(self, folder: Path, shards: int, samples: int, captions: int) -> None:
        folder.mkdir()
        names = [write_shard(folder / f"{n:05d}.tar", n, samples, captions) for n in range(shards)]
        self.cfg = DataConfig(shards=(f"{folder}/*.tar",), num_workers=0)
        self.cached = dataclasses.replace(self.cfg, features=str(folder / "cache"))
        texts = CaptionCache(self.cached.features, names, Sixteen(), "")
        self.features = FeatureCache(self.cached.features, "random", names, [PATCH_SIZE])
        self.features.claim(WIDTH)
        rng = np.random.default_rng(0)
        for number in range(shards):
            texts.write(number)
            keys = load_index(names[number]).keys
            rows = rng.standard_normal((len(keys), WIDTH), dtype=np.float32)
            self.features.write(number, PATCH_SIZE, 0, keys, rows)

    def batches(self, cfg: DataConfig) -> Iterator[Batch]:
        tokenizer = Sixteen()
        options: dict[str, Any] = {
            "seed": 0,
            "global_batch_size": BATCH,
            "rank": 0,
            "world_size": 1,
        }
        return CaptionedPipeline(cfg, None, tokenizer=tokenizer, **options).batches(0, 10**9)

    def check_equal(self) -> None:
        """What a step reads, over one batch."""
        ours, theirs = next(self.batches(self.cached)), next(self.batches(self.cfg))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.captions == theirs.captions
        assert ours.keys == theirs.keys
        for name in ("concepts", "valid", "shards", "indices", "views"):
            assert getattr(ours, name).equal(getattr(theirs, name)), name

    def contenders(self) -> dict[str, Callable[[], object]]:
        cached, read = self.batches(self.cached), self.batches(self.cfg)

        def pipeline() -> None:
            for _ in islice(cached, BATCHES):
                pass

        def with_features() -> None:
            for batch in islice(cached, BATCHES):
                self.features.lookup(batch.shards.numpy(), batch.indices.numpy(), PATCH_SIZE)

        return {
            "cached": pipeline,
            "cached, with features": with_features,
            "read from shards": lambda: next(read),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()

    figures: dict[str, Any] = {"batch": BATCH, "tokens": TOKENS, "width": WIDTH}
    figures |= {"shards": args.shards, "samples_of_a_shard": args.samples}
    targets = []
    with tempfile.TemporaryDirectory() as folder:
        for captions, wanted in WANTED.items():
            data = Cached(Path(folder) / str(captions), args.shards, args.samples, captions)
            data.check_equal()
            timings = interleave(data.contenders(), args.rounds)
            table = {}
            for name in timings.seconds:
                pairs = BATCH * (1 if name == "read from shards" else BATCHES)
                low, high = timings.quartiles(name)
                table[name] = {
                    "pairs_per_s": pairs / timings.median(name),
                    "quartiles_pairs_per_s": [pairs / high, pairs / low],
                }
                print(captions, name, f"{table[name]['pairs_per_s']:,.0f} pairs/s", flush=True)
            figures[f"{captions}_captions"] = table
            got = BATCH * BATCHES / timings.median("cached")
            what = f"cached pipeline, {captions} captions an image, pairs/s"
            targets.append(Target(what, f">= {wanted}", got))
    finish("cached_pipeline", figures, targets, packages=("torch", "numpy", "pyarrow"), where="cpu")


if __name__ == "__main__":
    main()
