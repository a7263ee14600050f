"""Peak memory of an evaluation's recall at 10,000 and at 100,000 images.

    python benchmarks/eval_memory.py

One process per case. Batches are like a reader's, with a caption for each image. Random vectors of
width 64 stand in for the model, whose memory does not depend on the number of images. The rest is
what `evaluate` runs: embeddings and captions go to disk, then recall@1, 5 and 10 both ways by exact
search.

Memory is the most that is resident and belongs to no file (Linux's RssAnon, read every 5 ms): the
mapped embeddings belong to the page cache, which can drop them. `before_mib` is what the process
held before the first batch (Python, torch, FAISS).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from data.batch import EvalBatch
from lib.harness import Target, finish
from retrieval.evaluation.recall_collector import RecallCollector

CASES = (10_000, 100_000)  # images
WIDTH = 64
BATCH = 250  # images


def anonymous_mib() -> float:
    """Resident memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def unit_rows(rng: np.random.Generator, count: int) -> Float[np.ndarray, "n d"]:
    rows = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run(num_images: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    before = peak = anonymous_mib()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        collector = RecallCollector(Path(folder), [16], WIDTH, shared_captions=False)
        for first in range(0, num_images, BATCH):
            keys = [f"{n:09d}" for n in range(first, first + BATCH)]
            rows, zeros = torch.arange(first, first + BATCH), torch.zeros(BATCH, dtype=torch.int64)
            captions: list[tuple[str, ...]] = [(f"caption of {key}",) for key in keys]
            batch = EvalBatch(keys, None, captions, zeros - 1, 0, rows, zeros, zeros)
            collector.add(batch, {16: unit_rows(rng, BATCH)})
        collector.recall(lambda texts: unit_rows(rng, len(texts)))
    done.set()
    watcher.join()
    return {
        "peak_mib": peak,
        "before_mib": before,
        "embeddings_mib": 2 * num_images * WIDTH * 4 / 2**20,
        "whole_score_matrix_mib": num_images**2 * 4 / 2**20,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, help="one case, in this process")
    args = parser.parse_args()
    if args.images:
        print(json.dumps(run(args.images)))
        return
    figures = {}
    for count in CASES:
        command = [sys.executable, __file__, "--images", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[f"{count} images"] = json.loads(done.stdout.splitlines()[-1])
        print(count, figures[f"{count} images"])
    few, many = (figures[f"{count} images"]["peak_mib"] for count in CASES)
    target = Target("peak memory, 100,000 images over 10,000", "<= 1.05", many / few)
    finish("eval_memory", figures, [target], packages=("torch", "numpy", "faiss-gpu"))


if __name__ == "__main__":
    main()
