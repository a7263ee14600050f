"""Batches gathered from cached columns: a few array operations a shard, none a sample."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int

from data.batch import Batch, LazyStrings
from data.cache.captions import CaptionCache, CaptionColumns
from data.cache.features import runs
from data.config import DataConfig
from data.pipeline.draw import draw_all
from data.pipeline.order import Order
from data.problems import SampleError, add_counts
from data.token_ids import TokenIds

_Picked = list[tuple[CaptionColumns, Int[np.ndarray, " _"]]]
"""Columns of shards, and numbers of samples or captions there."""


class ColumnGather:
    """Positions [start, stop) of the global order as a batch without pixels.

    What a sample's captions and view are is drawn as where shards are read, so batches are equal.
    """

    def __init__(
        self, order: Order, cache: CaptionCache, shards: Sequence[str], cfg: DataConfig, seed: int
    ) -> None:
        """`seed`: of the draws."""
        self._order, self._cache, self._shards = order, cache, shards
        self._cfg, self._seed = cfg, seed

    def __call__(self, start: int, stop: int) -> Batch:
        """Raises `SampleError` for a bad sample where `on_error` is "raise"."""
        epochs, shards, indices = np.ascontiguousarray(self._order.slice(start, stop).T)
        by_shard = np.lexsort((indices, shards))  # files are read forward
        picked, errors = self._pick(shards[by_shard], indices[by_shard])
        good = np.concatenate([columns.good[rows] for columns, rows in picked])
        first = np.concatenate([columns.first[rows] for columns, rows in picked])
        counts = np.concatenate([columns.first[rows + 1] for columns, rows in picked]) - first
        concepts = np.concatenate([columns.concepts[rows] for columns, rows in picked])
        draw = partial(
            draw_all,
            seed=self._seed,
            epochs=epochs[by_shard],
            keys_of=lambda rows: _keys(picked, pa.binary()).take(pa.array(rows)).to_numpy(False),
        )
        views = draw(np.where(good, self._cfg.views, 0), what="view")
        drawn = _captions(picked, good, first + draw(counts))
        places = np.empty_like(by_shard)
        places[by_shard] = np.arange(len(by_shard))
        texts = np.where(good, np.cumsum(good) - 1, good.sum())[places]  # the last one is empty
        tokens = TokenIds.join([*(c.tokens.take(rows) for c, rows in drawn), TokenIds.empty(1)])
        return Batch(
            step=0,
            keys=LazyStrings(len(texts), lambda: _strings(_keys(picked, pa.string()), places)),
            images=None,
            captions=LazyStrings(len(texts), lambda: _strings(_texts(drawn), texts)),
            tokens=tokens.take(texts),
            concepts=torch.from_numpy(concepts[places]),
            valid=torch.from_numpy(good[places]),
            shards=torch.from_numpy(shards),
            indices=torch.from_numpy(indices),
            views=torch.from_numpy(views[places]),
            errors=errors,
        )

    def _pick(
        self, shards: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> tuple[_Picked, dict[str, int]]:
        """Each shard's columns and its samples, and the bad samples among them by kind."""
        picked: _Picked = []
        errors: dict[str, int] = {}
        for low, high in pairwise(runs(shards)):
            shard, rows = int(shards[low]), indices[low:high]
            columns = self._cache.columns(shard)
            bad = rows[~columns.good[rows]]
            if len(bad) and self._cfg.on_error == "raise":
                raise SampleError.at(self._shards[shard], columns.problem(int(bad[0])))
            if len(bad):
                add_counts(errors, Counter(columns.problems.take(pa.array(bad)).to_pylist()))
            picked.append((columns, rows))
        return picked, errors


def _captions(
    picked: _Picked, good: Bool[np.ndarray, " b"], texts: Int[np.ndarray, " b"]
) -> _Picked:
    """The drawn captions of the good samples, shard by shard."""
    ends = np.cumsum([len(rows) for _, rows in picked]).tolist()
    return [
        (columns, texts[low:high][good[low:high]])
        for (columns, _), (low, high) in zip(picked, pairwise([0, *ends]), strict=True)
    ]


def _keys(picked: _Picked, kind: pa.DataType) -> pa.Array:
    found = pa.concat_arrays([columns.keys.take(pa.array(rows)) for columns, rows in picked])
    return found.cast(kind)


def _texts(drawn: _Picked) -> pa.Array:
    """The drawn captions, and an empty one after them."""
    found = [columns.captions.take(pa.array(rows)) for columns, rows in drawn]
    return pa.concat_arrays([*found, pa.array([""], pa.string())])


def _strings(found: pa.Array, rows: Int[np.ndarray, " b"]) -> list[str]:
    return found.take(pa.array(rows)).to_pylist()
