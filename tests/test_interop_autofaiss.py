"""autofaiss as published (in .venv-interop/autofaiss) reads the embeddings that we write."""

import subprocess
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from shard_maker import encode, write_tar

from contrastive import LitModel, VisionTower
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.vision.tower_config import TowerConfig
from retrieval import Searcher, build_index, embed_shards

pytestmark = pytest.mark.interop

AUTOFAISS = Path(__file__).parents[1] / ".venv-interop/autofaiss/bin/autofaiss"
SIDE = 32  # pixels
PATCH_SIZE = 16


def write_shard(path: Path, first: int, count: int) -> list[Image.Image]:
    """A tar of `count` noise pictures with captions, as img2dataset lays it out."""
    rng = np.random.default_rng(first)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)
    ]
    members = []
    for number, picture in enumerate(pictures, start=first):
        members.append((f"{number:05d}.png", encode(picture, "PNG")))
        members.append((f"{number:05d}.txt", f"noise number {number}".encode()))
    write_tar(path, members)
    return pictures


def small_model() -> LitModel:
    """The real classes, with untrained weights of a size that takes no time."""
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    size = {"img_size": SIDE, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    tower = VisionTower(
        timm.create_model(name, pretrained=False, **size),
        TowerConfig(name, size, image_size=SIDE, patch_sizes=(16, 8)),
    )
    text = TextSide(TextEncoder(load_text_tower(TextConfig()), tower.embed_dim), LossConfig())
    return LitModel(tower.lock(), text).eval()


def test_autofaiss_index_of_our_embeddings_gives_our_hits(tmp_path: Path) -> None:
    if not AUTOFAISS.is_file():
        pytest.fail("autofaiss is not in .venv-interop/autofaiss; `make interop` installs it")
    shards = [tmp_path / "0000.tar", tmp_path / "0001.tar"]
    pictures = write_shard(shards[0], 0, 12) + write_shard(shards[1], 12, 7)
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    embeddings = tmp_path / "embeddings"
    embed_shards(
        model,
        [str(shard) for shard in shards],
        [PATCH_SIZE],
        embeddings,
        num_workers=0,
        model_dir=tmp_path / "model",
    )

    theirs = tmp_path / "autofaiss.index"
    run = subprocess.run(
        [
            AUTOFAISS,
            "build_index",
            f"--embeddings={embeddings / f'patch_{PATCH_SIZE}' / 'img_emb'}",
            f"--index_path={theirs}",
            f"--index_infos_path={tmp_path / 'infos.json'}",
            "--index_key=Flat",
            "--metric_type=ip",
            "--max_index_memory_usage=1G",
            "--current_memory_available=2G",
            "--nb_cores=1",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]

    build_index(embeddings, tmp_path / "index", kind="flat", device="cpu")
    ours = Searcher.load(tmp_path / "index").search(pictures, k=5, patch_size=PATCH_SIZE)

    index = faiss.read_index(str(theirs))
    assert index.ntotal == len(pictures)
    queries = model.encode_image(pictures, patch_size=PATCH_SIZE).numpy()
    similarities, rows = index.search(queries, 5)
    # Their ids are row numbers in the order of the partitions, and so are metadata rows.
    metadata = [pq.read_table(f) for f in sorted((embeddings / "metadata").glob("*.parquet"))]
    keys = [key for table in metadata for key in table["key"].to_pylist()]
    assert [[keys[row] for row in line] for line in rows] == [
        [h.key for h in hits] for hits in ours
    ]
    assert [hits[0].key for hits in ours] == [f"{n:05d}" for n in range(len(pictures))]
    np.testing.assert_allclose(
        similarities, [[h.similarity for h in hits] for hits in ours], atol=1e-6
    )
