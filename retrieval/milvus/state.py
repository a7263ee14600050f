"""An index in Milvus as `IndexState`: what searching and the service ask of it."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.errors import UsageError
from retrieval.detail import Detail
from retrieval.index.filters import Where
from retrieval.index.manifest import IndexManifest
from retrieval.milvus.catalogue import Catalogue
from retrieval.milvus.client import VECTOR, as_ids
from retrieval.milvus.expressions import expression
from retrieval.words.asked import WordQuery
from retrieval.words.ranking import Matches

NPROBE, EF = 16, 128  # where a search does not say
FILTERED, MAX_REACH = 8, 32_768  # times as far with a filter; and where that finds too few
ATTEMPTS = 4  # at drawing ids; a span has few gaps
HITS_AT_ONCE = 16_384  # of one call, with their metadata
KEPT_ROWS = 32_768  # metadata of hits, which are asked for next
LOOKED_AT = 10_000  # rows that show what a column holds


class MilvusState:
    """One state of an index, as far as Milvus has states: a deleted image is gone at once. Images
    that were added since, or are being added, are not found.

    Metadata come with the hits of a search, and are kept for the look-up that follows it.
    """

    def __init__(self, catalogue: Catalogue, manifest: IndexManifest, kept: Path) -> None:
        self.manifest, self.kept = manifest, kept
        self.generation, self.width = manifest.generation, manifest.width
        self.patch_sizes = manifest.patch_sizes
        self.columns: pa.Schema | None = catalogue.columns.schema
        self._columns, self._connection = catalogue.columns, catalogue.connection
        self._address = catalogue.address
        self._fields = [field for name, field in self._columns.fields.items() if name != "id"]
        self._whole = catalogue.collections(manifest)[-1]  # has whatever the others have
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._shown: dict[str, pa.ChunkedArray] | None = None
        self._has_grown = False  # whether a search came upon images that do not count yet

    def __len__(self) -> int:
        return self.manifest.count

    def _counted(self, asked: str = "") -> str:
        """An expression for the images that the manifest counts, of those that one lets through."""
        counted = f"id < {self.manifest.next_id}"
        return f"{counted} and ({asked})" if asked else counted

    def _get(
        self, collection: str, ids: Sequence[int], fields: Sequence[str]
    ) -> list[dict[str, Any]]:
        counted = [id for id in dict.fromkeys(map(int, ids)) if id < self.manifest.next_id]
        return self._connection.get(collection, counted, fields)

    # ---- rows ------------------------------------------------------------------------------

    def rows(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """The metadata of ids, in the order given. Raises KeyError for an unknown one."""
        wanted = [int(id) for id in ids]
        with self._lock:
            found = {id: self._kept[id] for id in wanted if id in self._kept}
        if missing := [id for id in wanted if id not in found]:
            found |= self._keep(self._get(self._whole, missing, self._fields))
        return [dict(found[id]) for id in wanted]

    def _keep(self, stored: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Rows of Milvus, decoded, by id."""
        found = {row["id"]: row for row in self._columns.decode(stored)}
        with self._lock:
            self._kept.update(found)
            while len(self._kept) > KEPT_ROWS:
                self._kept.popitem(last=False)
        return found

    def vectors(self, ids: Sequence[int], patch_size: Detail) -> Float[np.ndarray, "n d"]:
        """The stored vectors of ids, float32. Raises KeyError for an unknown one."""
        found = self.known_vectors(ids, patch_size)
        rows = [found[int(id)] for id in ids]
        return np.stack(rows) if rows else np.zeros((0, self.width), np.float32)

    def known_vectors(
        self, ids: Sequence[int], patch_size: Detail
    ) -> dict[int, Float[np.ndarray, " d"]]:
        """`vectors` by id, without the unknown ones."""
        rows = self._get(self._address.collection(patch_size), ids, [VECTOR])
        return {row["id"]: np.asarray(row[VECTOR], np.float32) for row in rows}

    def ids(self, where: Where | None = None, most: int | None = None) -> Int[np.ndarray, " n"]:
        """The ids that a filter lets through, ascending. Milvus is asked for 8,192 at a time."""
        asked = self._counted(expression(where, self._columns))
        batches = self._connection.iterate(self._whole, asked, [], most)
        return np.concatenate([np.zeros(0, np.int64), *map(as_ids, batches)])

    def count_matching(self, where: Where | None) -> int:
        """How many images a filter lets through."""
        if where is None:
            return len(self)
        return self._connection.count(self._whole, self._counted(expression(where, self._columns)))

    def draw(self, count: int, seed: int | None = None) -> Int[np.ndarray, " n"]:
        """Ids at random, out of the spans of ids that were added at once."""
        spans = np.array(self.manifest.unknown.get("spans", []), np.int64).reshape(-1, 2)
        lengths = spans[:, 1] - spans[:, 0] + 1
        rng, found = np.random.default_rng(seed), np.zeros(0, np.int64)
        if count >= len(self):
            return rng.permutation(self.ids())
        for _ in range(ATTEMPTS):
            chosen = rng.choice(len(spans), 2 * count, p=lengths / lengths.sum())
            drawn = spans[chosen, 0] + rng.integers(0, lengths[chosen])
            held = as_ids(self._get(self._whole, np.unique(drawn).tolist(), []))
            found = np.union1d(found, held)
            if len(found) >= count:
                break
        return rng.permutation(found)[:count]

    @property
    def has_words(self) -> bool:
        """Not yet."""
        return False

    def matching_words(
        self,
        query: WordQuery,
        where: Where | None = None,
        least_share: float = 0.0,
        of_best: float = 0.0,
    ) -> Matches:
        """Raises `UsageError`."""
        raise UsageError("words are searched for in index folders; Milvus finds by vectors alone")

    def column_values(self, name: str, most: int | None = None) -> pa.ChunkedArray:
        """What a column holds, without nulls: of all images, or of 10,000 at random."""
        if self._shown is None:
            self._shown = {
                one: pa.chunked_array([self._columns.values_of(one, values)])
                for one, values in self._some_values().items()
            }
        return self._shown[name].drop_null().slice(0, most)

    def _some_values(self) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {name: [] for name in self._columns.fields}
        for batch in self._some_rows():
            for name, field in self._columns.fields.items():
                values[name] += [row[field] for row in batch]
        return values

    def _some_rows(self) -> Iterator[list[dict[str, Any]]]:
        if len(self) <= LOOKED_AT:
            yield from self._connection.iterate(self._whole, self._counted(), self._fields)
        else:
            ids = np.sort(self.draw(LOOKED_AT, seed=0)).tolist()
            yield self._get(self._whole, ids, self._fields)

    # ---- search ----------------------------------------------------------------------------

    def nearest(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(similarities, ids), best first, equal ones by id; -1 where fewer than k were found."""
        queries = np.ascontiguousarray(queries, np.float32)
        asked, size = expression(where, self._columns), patch_size
        similarities, ids = self._search(queries, k, size, asked, self._reach(k, asked, nprobe, ef))
        short = (ids < 0).any(axis=1) if asked else np.zeros(len(ids), bool)
        if short.any() and self.manifest.index_type != "flat":  # look further, for as many as match
            most = self._reach(k, asked, MAX_REACH, MAX_REACH)
            similarities[short], ids[short] = self._search(queries[short], k, size, asked, most)
        return similarities, ids

    def _reach(self, k: int, asked: str, nprobe: int | None, ef: int | None) -> dict[str, int]:
        """How far a search looks, as Milvus spells it; further where a filter leaves rows out."""
        wider = FILTERED if asked else 1
        if self.manifest.index_type == "hnsw":
            return {"ef": max(ef or EF * wider, k)}
        if self.manifest.index_type == "ivf":
            return {"nprobe": min(nprobe or NPROBE * wider, int(self.manifest.unknown["nlist"]))}
        return {}

    def _search(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        asked: str,
        reach: Mapping[str, int],
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        at_once = max(1, HITS_AT_ONCE // k)
        ask = partial(self._connection.search, self._address.collection(patch_size))
        for start in range(0, len(queries), at_once):
            part = queries[start : start + at_once]
            if not self._has_grown:
                found = ask(part, k, asked, self._fields, reach)
                self._has_grown = any(
                    row["id"] >= self.manifest.next_id for hits in found for _, row in hits
                )
            if self._has_grown:  # which costs Milvus a filter
                found = ask(part, k, self._counted(asked), self._fields, reach)
            self._keep([row for hits in found for _, row in hits])
            for number, hits in enumerate(found, start):
                ranked = sorted(((s, row["id"]) for s, row in hits), key=lambda h: (-h[0], h[1]))
                for place, hit in enumerate(ranked):
                    similarities[number, place], ids[number, place] = hit
        return similarities, ids
