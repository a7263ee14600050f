"""An index of synthetic vectors with a model beside it, and our server over it."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from contrastive import LitModel, load_vision_tower
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from lib.vectors import rows_of, synthetic
from retrieval.index.build import index_rows, new_manifest
from retrieval.index.config import IndexTypeChoice

SERVE = Path(__file__).resolve().parents[2] / "launch" / "serve.py"
PATCH = 28
KINDS = ("a red", "a small", "an old", "two happy", "a broken", "a sleeping", "some yellow")
THINGS = ("cat", "dog", "house", "tree", "river", "bicycle", "mountain", "bridge", "train")
PLACES = ("in the rain", "at night", "on a table", "by the sea", "in winter", "under a roof")


def texts(seed: int) -> Iterator[str]:
    """Captions of four to nine words, the same ones for a seed."""
    draw = random.Random(seed)
    for number in itertools.count():
        parts = (draw.choice(KINDS), draw.choice(THINGS), draw.choice(PLACES), str(number))
        yield " ".join(parts)


def build(folder: Path, count: int, types: Sequence[IndexTypeChoice] = ("auto",)) -> None:
    """A model with an untrained projection, and indexes of synthetic vectors that fit it: `index`
    of the first type, `index_TYPE` of others."""
    torch.manual_seed(0)
    tower = load_vision_tower("dinov2s")
    text = TextEncoder(load_text_tower(TextConfig()), tower.embed_dim)
    model = LitModel(tower, TextSide(text, LossConfig())).eval()
    model.save_pretrained(folder / "model")
    names = [f"image {number}" for number in range(count)]
    vectors = synthetic(count, 1, max(1, count // 200))
    rows = rows_of(vectors, PATCH, key=names, caption=names, shard=["gone.tar"] * count)
    for type_ in types:
        out = folder / ("index" if type_ == types[0] else f"index_{type_}")
        manifest = new_manifest(
            model.image_fingerprint, model.text_fingerprint, tower.embed_dim, [PATCH],
            index_type=type_,
        )  # fmt: skip
        print(index_rows(out, folder / "model", manifest, [rows]))


@contextmanager
def serving(index: Path, *flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Our server over an index, stopped at the end; yields its port and its process."""
    command = [sys.executable, str(SERVE), "--port", "0", *flags, "--index", str(index)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        port = int(next(line for line in lines if line.startswith("http")).rpartition(":")[2])
        yield port, server
    finally:
        server.terminate()
        server.wait(60)
