"""The captions of the training shards, tokenised once; vectors of a frozen text tower, computed
once."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset

from contrastive import distributed
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from data.cache.captions import CaptionCache
from data.cache.text_vectors import TextVectorCache
from data.captions import Tokenizer
from data.config import DataConfig
from data.errors import DataError, UsageError
from data.pipeline.workers import begin_worker
from data.progress import Progress
from data.shards.names import expand_shards
from data.token_ids import TokenIds

TEXTS = 256  # that are read together


def fill_texts(cfg: DataConfig, tokenizer: Tokenizer) -> None:
    """Read and tokenise the captions that the cache in `cfg.features` lacks, by all ranks."""
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    cache = CaptionCache(cfg.features, shards, tokenizer, cfg.index_dir)
    missing = sorted(
        distributed.gather_lists(cache.missing(distributed.own_share(range(len(shards)))))
    )
    jobs = DataLoader(
        _TextJobs(cache, distributed.own_share(missing)),
        batch_size=None,
        num_workers=cfg.num_workers,
        worker_init_fn=begin_worker,
    )
    quiet = not distributed.is_main()
    for done in Progress(jobs, "captions", unit="shard", delay=2, disable=quiet):
        if done is not None:
            raise done
    distributed.barrier(patient=True)


class _TextJobs(Dataset):
    """Shards whose texts are to be cached; an error is handed over, and raised by the caller."""

    def __init__(self, cache: CaptionCache, shards: Sequence[int]) -> None:
        self._cache, self._shards = cache, shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> UsageError | DataError | None:
        if number >= len(self):
            raise IndexError
        try:
            self._cache.write(self._shards[number])
        except (UsageError, DataError) as error:
            return error
        return None


def open_text_vectors(cfg: DataConfig, tower: TextTower) -> TextVectorCache:
    """The cache in `cfg.features` of what this tower makes of its captions."""
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    fingerprint = f"{tower.tokenizer.fingerprint}.{tower.fingerprint}"
    return TextVectorCache(cfg.features, shards, fingerprint)


def fill_text_vectors(cfg: DataConfig, tower: TextTower, cache: TextVectorCache) -> None:
    """Compute what `open_text_vectors`' cache lacks, by all ranks; captions are cached already."""
    shards = expand_shards(cfg.shards, cfg.allow_pipe)
    captions = CaptionCache(cfg.features, shards, tower.tokenizer, cfg.index_dir)
    own = distributed.own_share(range(len(shards)))
    missing = [s for s in own if cache.missing(s, len(captions.columns(s).tokens))]
    quiet = not distributed.is_main()
    for shard in Progress(missing, "text vectors", unit="shard", delay=2, disable=quiet):
        cache.write(shard, text_vectors(tower, captions.columns(shard).tokens))
    distributed.barrier(patient=True)


@torch.no_grad()
def text_vectors(tower: TextTower, texts: TokenIds) -> Float[np.ndarray, "c w"]:
    """The tower's vectors, float32. Equal texts are read once, texts of like length together."""
    lengths = texts.lengths
    ids, _ = texts.padded(int(lengths.max(initial=0)), 0)
    rows = np.column_stack([lengths, ids])  # the length tells padding from a token of that number
    distinct, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:]
    vectors = np.zeros((len(distinct), tower.width), dtype=np.float32)
    for start in range(0, len(distinct), TEXTS):  # np.unique has sorted them by length
        part = distinct[start : start + TEXTS]
        tokens = TokenBatch.of(tower, texts.take(part)).to(distributed.device())
        vectors[start : start + TEXTS] = tower(tokens.groups).float().cpu().numpy()
    return vectors[inverse.ravel()]
