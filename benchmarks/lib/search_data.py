"""What `benchmarks/search.py` indexes and asks for, as files of a folder.

vectors.npy, queries.npy     always
captions.json, moved.npy     of mixtures: captions to tune by, "" where none is; other queries
"""

import json
from pathlib import Path

import numpy as np

from lib.harness import ROOT, run_demo
from lib.vectors import mixtures, synthetic
from retrieval.embed.manifest import read_manifest
from retrieval.index.row_sources import EmbeddedPartition
from retrieval.index.tune import moved_vectors

MODEL = ROOT / "runs" / "index" / "model"
PATCH = 28
QUERIES = 1000
PER_CLUSTER = 200  # synthetic vectors around one centre


def write_vectors(folder: Path, count: int) -> None:
    """`vectors.npy` and `queries.npy`."""
    folder.mkdir()
    clusters = max(1, count // PER_CLUSTER)
    np.save(folder / "vectors.npy", synthetic(count, 1, clusters))
    np.save(folder / "queries.npy", synthetic(QUERIES, 2, clusters))


def write_default_data(folder: Path) -> None:
    """The demo's drawings, and its captions as queries."""
    vectors, captions = _demo()
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors)
    texts = list(dict.fromkeys(c for c in captions if c))[:QUERIES]
    np.save(folder / "queries.npy", _encoded(texts))


def write_mixtures(folder: Path, count: int) -> None:
    """Mixtures of the demo's drawings; their captions in two halves, `captions.json` (row by row)
    to tune by, and `queries.npy`; beside these `moved.npy`."""
    real, captions = _demo()
    folder.mkdir()
    vectors, first = mixtures(real, count, 1)
    texts = sorted({caption for caption in captions if caption})
    queries = texts[::2]
    kept = set(texts[1::2])
    column = [captions[row] if captions[row] in kept else "" for row in first]
    (folder / "captions.json").write_text(json.dumps(column))
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", _encoded(queries))
    others, _ = mixtures(real, QUERIES, 2)
    np.save(folder / "moved.npy", np.concatenate([moved_vectors(p) for p in np.split(others, 4)]))


def _demo() -> tuple[np.ndarray, list[str]]:
    """Vectors and captions of the demo's drawings."""
    embeddings = ROOT / "runs" / "embeddings"
    if not MODEL.is_dir():
        run_demo()
    shards = [
        EmbeddedPartition(embeddings, number, partition["count"])
        for number, partition in enumerate(read_manifest(embeddings)["partitions"])
    ]
    vectors = np.concatenate([s.vectors(PATCH, 0, s.count) for s in shards])
    return vectors, [c for s in shards for c in s.metadata(0, s.count)["caption"].to_pylist()]


def _encoded(texts: list[str]) -> np.ndarray:
    from contrastive import LitModel

    return LitModel.from_pretrained(MODEL).encode_text(texts).numpy()
