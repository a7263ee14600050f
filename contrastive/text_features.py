"""Vectors of a frozen text tower, computed once for all captions of the training shards."""

import numpy as np
import torch
from jaxtyping import Float

from contrastive import distributed
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from data.cache.captions import CaptionCache
from data.cache.text_vectors import TextVectorCache
from data.config import DataConfig
from data.progress import Progress
from data.shards.names import expand_shards
from data.token_ids import TokenIds

TEXTS = 256  # that are read together


def open_text_vectors(cfg: DataConfig, tower: TextTower) -> TextVectorCache:
    """The cache in `cfg.features` of what this tower makes of its captions."""
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    fingerprint = f"{tower.tokenizer.fingerprint}.{tower.fingerprint}"
    return TextVectorCache(cfg.features, shards, fingerprint)


def fill_text_vectors(cfg: DataConfig, tower: TextTower) -> None:
    """Compute what the cache lacks, by all ranks; the captions are cached already."""
    shards, cache = expand_shards(cfg.shards, cfg.allow_pipe), open_text_vectors(cfg, tower)
    captions = CaptionCache(cfg.features, shards, tower.tokenizer, cfg.index_dir)
    own = range(distributed.rank(), len(shards), distributed.world_size())
    missing = [shard for shard in own if cache.missing(shard)]
    quiet = not distributed.is_main()
    for shard in Progress(missing, "text vectors", unit="shard", delay=2, disable=quiet):
        cache.write(shard, text_vectors(tower, captions.columns(shard).tokens))
    distributed.barrier(patient=True)


@torch.no_grad()
def text_vectors(tower: TextTower, texts: TokenIds) -> Float[np.ndarray, "c w"]:
    """The tower's vectors, float32; texts of like length are read together."""
    vectors = np.zeros((len(texts), tower.width), dtype=np.float32)
    order = np.argsort(texts.lengths, kind="stable")
    for rows in np.split(order, range(TEXTS, len(order), TEXTS)):
        if len(rows):
            tokens = TokenBatch.of(tower, texts.take(rows)).to(distributed.device())
            vectors[rows] = tower(tokens.groups).float().cpu().numpy()
    return vectors
