"""Folders of embeddings as `embed_shards` writes them, of clustered vectors instead of images."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contrastive.model.lit import LitModel
from retrieval.embed.partitions import METADATA_SCHEMA, vector_file

PATCH = 28


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around 40 centres, the same centres for every seed."""
    centres = np.random.default_rng(0).standard_normal((40, width))
    rng = np.random.default_rng(seed + 1)
    vectors = centres[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_embeddings(
    folder: Path, model: LitModel, model_dir: Path, counts: Sequence[int], seed: int = 0
) -> Path:
    """Partitions of these many vectors; ids with gaps, captions `seed-partition-row`, and a column
    `even` beside the usual ones."""
    for number, count in enumerate(counts):
        file = vector_file(folder, PATCH, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, clustered(count, model.embed_dim, 100 * seed + number))
        ids = (number << 32) + 2 * np.arange(count)
        names = [f"{seed}-{number}-{row}" for row in range(count)]
        columns = {
            "id": ids,
            "key": names,
            "caption": names,
            "shard": ["gone.tar"] * count,
            "offset": ids,
            "size": ids,
            "even": np.arange(count) % 2 == 0,
        }
        (folder / "metadata").mkdir(exist_ok=True)
        schema = pa.schema([*METADATA_SCHEMA, pa.field("even", pa.bool_())])
        table = pa.Table.from_pydict(columns, schema=schema)
        pq.write_table(table, folder / "metadata" / f"metadata_{number:04d}.parquet")
    manifest = {
        "format": 1,
        "image_fingerprint": model.image_fingerprint,
        "text_fingerprint": model.text_fingerprint,
        "model": str(model_dir),
        "width": model.embed_dim,
        "patch_sizes": [PATCH],
        "count": sum(counts),
        "partitions": [{"shard": "gone.tar", "count": count} for count in counts],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def all_vectors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, ids) of a folder of embeddings."""
    files = sorted(folder.rglob("*.parquet"))
    vectors = [np.load(vector_file(folder, PATCH, number)) for number in range(len(files))]
    return np.concatenate(vectors), np.concatenate([pq.read_table(f)["id"] for f in files])


def nearest(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Ids of the exact k nearest."""
    return ids[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]]


def recall(found: np.ndarray, best: np.ndarray) -> float:
    """Share of the best that were found; -1, where fewer than k match, is nothing to find."""
    pairs = [(set(a) - {-1}, set(b) - {-1}) for a, b in zip(found, best, strict=True)]
    return float(np.mean([len(a & b) / len(b) for a, b in pairs if b]))
