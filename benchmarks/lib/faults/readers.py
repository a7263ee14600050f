"""Reads what the project writes, whole, as a job: the value is compared with that of the original.

Digests and rounded scores stand for long contents.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from contrastive import LitModel, load_vision_tower
from contrastive.image_features import FeatureSource
from contrastive.run.checkpoint import newest_checkpoint
from contrastive.run.config_file import load_config
from contrastive.text.config import TextConfig
from contrastive.text.load import load_text_tower
from contrastive.text_features import fill_texts
from contrastive.train.config import TrainConfig
from data.config import DataConfig
from data.errors import UsageError
from data.pipeline.captioned import CaptionedPipeline
from retrieval.search.searcher import Searcher

PATCH_SIZES = (40, 16)
QUERIES = ("a happy cat", "rain", "an old house")


def digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()


def answers(index: Path) -> list[Any]:
    """Every image of an index with its similarity to some texts, in an order of their own."""
    searcher = Searcher.load(index, device="cpu")
    found: list[Any] = [len(searcher)]
    for size in searcher.patch_sizes:
        for hits in searcher.search(QUERIES, min(2048, max(1, len(searcher))), size):
            rows = sorted((hit.key, hit.caption, round(hit.similarity, 4)) for hit in hits)
            found.append(rows)
    return found


def model(folder: Path) -> list[Any]:
    """Embeddings of texts and of an image by a saved model."""
    lit = LitModel.from_pretrained(folder)
    rows = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    image = Image.fromarray(rows)
    parts = [lit.encode_text(QUERIES), lit.encode_image([image], patch_size=lit.patch_sizes[0])]
    return [digest(part.float().numpy().tobytes()) for part in parts]


def embeddings(folder: Path) -> dict[str, Any]:
    """Contents of a folder of embeddings; raises where a program that reads it would."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".npy", ".parquet"))
    found: dict[str, Any] = {}
    for file in files:
        name = str(file.relative_to(folder))
        if file.suffix == ".npy":
            found[name] = digest(np.load(file).tobytes())
        else:
            rows = pq.read_table(file).to_pylist()
            found[name] = [(row["id"], row["key"], row["caption"]) for row in rows]
    return found


def built(folder: Path, out: Path) -> list[Any]:
    """What an index built of embeddings answers."""
    from retrieval import build_index

    build_index(folder, out, device="cpu")
    return answers(out)


def compacted(index: Path) -> list[Any]:
    """What an index answers after its compaction."""
    from retrieval import compact_index

    compact_index(index, "cpu")
    return answers(index)


def checkpoint(run: Path) -> list[Any]:
    """The newest checkpoint: its state and the contents of its tensors. `UsageError` where it is
    passed over for an older one."""
    damaged: list[str] = []
    found = newest_checkpoint(run / "checkpoints", damaged.append)
    if damaged:
        raise UsageError(damaged[0])
    if found is None:
        return []
    folder, state = found
    told: list[Any] = [folder.name, {k: v for k, v in state.items() if k != "files"}]
    for file in sorted(folder.glob("*.pt")):
        tensors = torch.load(file, weights_only=False)
        told.append(digest(repr(_contents(tensors)).encode()))
    return told


def _contents(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return digest(value.detach().float().cpu().numpy().tobytes())
    if isinstance(value, dict):
        return {str(key): _contents(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_contents(part) for part in value]
    return repr(value) if isinstance(value, int | float | str | bool | None) else type(value)


def run_config(run: Path) -> str:
    """The configuration that `--resume` would use."""
    return repr(load_config(run, TrainConfig))


def history(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log, each step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted({(line["step"], line["loss"]) for line in lines if "loss" in line})


def training_data(shards: str, features: str, tower: str, text: str) -> list[Any]:
    """One epoch as a training reads it, through shard indexes and caches: keys, captions, token
    ids and features."""
    cfg = DataConfig(shards=(shards,), features=features, num_workers=0)
    vision = load_vision_tower(tower)
    tokenizer = load_text_tower(TextConfig(tower=text, context_length=16)).tokenizer
    source = FeatureSource(vision, cfg, PATCH_SIZES)
    fill_texts(cfg, tokenizer)
    pipeline = CaptionedPipeline(
        cfg, None, tokenizer=tokenizer, seed=0, global_batch_size=1, rank=0, world_size=1
    )
    found: list[Any] = []
    for batch in pipeline.batches(0, pipeline.num_samples or 0):
        features_, good = source(batch, PATCH_SIZES[0])
        found.append((batch.keys, batch.captions, batch.tokens.tolist(), good.tolist()))
        found.append(digest(features_.numpy().tobytes()))
    return found
