"""Batches gathered from cached columns: a few array operations a shard, none a sample."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.batch import Batch, LazyStrings
from data.cache.captions import CaptionCache, CaptionColumns
from data.cache.features import runs
from data.cache.text_vectors import TextVectorCache
from data.config import DataConfig
from data.pipeline.draw import draw_all, draw_several
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
        self,
        order: Order,
        cache: CaptionCache,
        shards: Sequence[str],
        cfg: DataConfig,
        seed: int,
        vectors: TextVectorCache | None = None,
    ) -> None:
        """`seed`: of the draws. `vectors`: of the captions; not given: batches have none."""
        self._order, self._cache, self._shards = order, cache, shards
        self._cfg, self._seed, self._vectors = cfg, seed, vectors

    def __call__(self, start: int, stop: int) -> Batch:
        """Raises `SampleError` for a bad sample where `on_error` is "raise"."""
        epochs, shards, indices = np.ascontiguousarray(self._order.slice(start, stop).T)
        by_shard = np.lexsort((indices, shards))  # files are read forward
        picked, errors = self._pick(shards[by_shard], indices[by_shard])
        good = np.concatenate([columns.good[rows] for columns, rows in picked])
        first = np.concatenate([columns.first[rows] for columns, rows in picked])
        counts = np.concatenate([columns.first[rows + 1] for columns, rows in picked]) - first
        concepts = np.concatenate([columns.concepts[rows] for columns, rows in picked])
        each: dict[str, Any] = {
            "seed": self._seed,
            "epochs": epochs[by_shard],
            "keys_of": lambda rows: _keys(picked, pa.binary()).take(pa.array(rows)).to_numpy(False),
        }
        views = draw_all(np.where(good, self._cfg.views, 0), what="view", **each)
        several = self._cfg.captions_per_image
        taken = np.where(good, counts.clip(max=several), 0)
        numbers = first[:, None] + draw_several(counts, several, **each)
        drawn = _captions(picked, taken, numbers[np.arange(several) < taken[:, None]])
        places = np.empty_like(by_shard)
        places[by_shard] = np.arange(len(by_shard))
        texts, slots = _in_order(taken, places) if several > 1 else (_or_empty(good, places), None)
        tokens = TokenIds.join([*(c.tokens.take(rows) for c, rows in drawn), TokenIds.empty(1)])
        return Batch(
            step=0,
            keys=LazyStrings(len(places), lambda: _strings(_keys(picked, pa.string()), places)),
            images=None,
            captions=LazyStrings(len(texts), lambda: _strings(_texts(drawn), texts)),
            tokens=tokens.take(texts),
            concepts=torch.from_numpy(concepts[places]),
            valid=torch.from_numpy(good[places]),
            shards=torch.from_numpy(shards),
            indices=torch.from_numpy(indices),
            views=torch.from_numpy(views[places]),
            errors=errors,
            slots=slots,
            text_vectors=self._text_vectors(shards[by_shard], drawn, texts),
        )

    def _text_vectors(
        self, shards: Int[np.ndarray, " b"], drawn: _Picked, texts: Int[np.ndarray, " t"]
    ) -> Float[Tensor, "t w"] | None:
        """Of the batch's captions, 0 where there is none. drawn: those of each of these shards."""
        if self._vectors is None:
            return None
        own = [self._vectors.vectors(int(shards[low])) for low, _ in pairwise(runs(shards))]
        found = [of[numbers] for of, (_, numbers) in zip(own, drawn, strict=True)]
        found.append(np.zeros((1, own[0].shape[1]), dtype=np.float32))
        return torch.from_numpy(np.concatenate(found)[texts])

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
            if len(bad):
                if self._cfg.on_error == "raise":
                    raise SampleError.at(self._shards[shard], columns.problem(int(bad[0])))
                add_counts(errors, Counter(columns.problems.take(pa.array(bad)).to_pylist()))
            picked.append((columns, rows))
        return picked, errors


def _captions(
    picked: _Picked, taken: Int[np.ndarray, " b"], texts: Int[np.ndarray, " t"]
) -> _Picked:
    """The drawn captions, shard by shard. taken: how many of each sample."""
    samples = np.cumsum([0, *(len(rows) for _, rows in picked)])
    bounds = np.concatenate([[0], taken.cumsum()])[samples].tolist()
    return [
        (columns, texts[low:high])
        for (columns, _), (low, high) in zip(picked, pairwise(bounds), strict=True)
    ]


def _or_empty(good: Bool[np.ndarray, " b"], places: Int[np.ndarray, " b"]) -> np.ndarray:
    """The drawn caption of each slot, which are those of good samples; else the empty one after."""
    return np.where(good, np.cumsum(good) - 1, good.sum())[places]


def _in_order(
    taken: Int[np.ndarray, " b"], places: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]:
    """The drawn captions slot by slot, and the slot of each.

    taken: how many of each sample. places: of each slot's sample among them.
    """
    firsts, own = (np.cumsum(taken) - taken)[places], taken[places]
    shifts = np.repeat(firsts - (np.cumsum(own) - own), own)
    return np.arange(own.sum()) + shifts, np.repeat(np.arange(len(own)), own)


def _keys(picked: _Picked, kind: pa.DataType) -> pa.Array:
    found = pa.concat_arrays([columns.keys.take(pa.array(rows)) for columns, rows in picked])
    return found.cast(kind)


def _texts(drawn: _Picked) -> pa.Array:
    """The drawn captions, and an empty one after them."""
    found = [columns.captions.take(pa.array(rows)) for columns, rows in drawn]
    return pa.concat_arrays([*found, pa.array([""], pa.string())])


def _strings(found: pa.Array, rows: Int[np.ndarray, " b"]) -> list[str]:
    return found.take(pa.array(rows)).to_pylist()
