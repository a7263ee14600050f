"""What a reader sees of an index folder: one consistent state, whatever is written meanwhile."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.errors import UsageError
from retrieval.detail import Detail
from retrieval.index.choose import bytes_per_vector
from retrieval.index.config import Device
from retrieval.index.exact import ExactVectors
from retrieval.index.filters import NamedFilter, Selection, Where, matching, written
from retrieval.index.folder import read_tombstones
from retrieval.index.gpus import ListsOnGpus, say_cpu_searches, to_gpus
from retrieval.index.manifest import IndexManifest, read_index_manifest
from retrieval.index.nearest import Found, nearest, nearest_exactly
from retrieval.index.segments import Segment
from retrieval.words.asked import WordQuery
from retrieval.words.ranking import Matches, TextIndex, TextSegment
from retrieval.words.text_file import DamagedWordsError, lacking

KEPT_FILTERS = 32  # whose rows a snapshot remembers
WORDS_AGAIN = "`python launch/index.py --out {} --words` writes them"
ATTEMPTS = 50  # at opening, while a writer replaces files


class Snapshot:
    """One state of an index. Make one with `Snapshot.open`; safe for any number of threads."""

    def __init__(self, folder: Path, manifest: IndexManifest, device: Device) -> None:
        self.folder = self.kept = folder
        self.manifest = manifest
        self.generation, self.width = manifest.generation, manifest.width
        self.patch_sizes = manifest.patch_sizes
        self.tombstones = read_tombstones(folder, manifest)  # ids, ascending
        self.segments = [
            Segment(folder, entry, self.patch_sizes, self.width, self.tombstones)
            for entry in manifest.segments
        ]
        self._first = np.array([segment.ids[0] for segment in self.segments], np.int64)
        self._lock = threading.Lock()
        self._selections: OrderedDict[tuple[int, str], Selection] = OrderedDict()
        self._gpu: dict[tuple[int, Detail], ExactVectors | ListsOnGpus] = {}
        for segment in self.segments:
            held = segment.count * bytes_per_vector(segment.index_type, self.width)
            for size in self.patch_sizes:
                copy = to_gpus(segment.indexes[size], segment.index_type, device, held)
                if copy is not None:
                    self._gpu[segment.number, size] = copy

    @classmethod
    def open(cls, folder: str | Path, device: Device = "cpu") -> "Snapshot":
        """The newest state of an index folder.

        Raises `UsageError` for a folder that is no index, is damaged or misses files.
        """
        folder = Path(folder)
        manifest = read_index_manifest(folder)
        for _ in range(ATTEMPTS):
            try:
                return cls(folder, manifest, device)
            except FileNotFoundError as error:
                problem = UsageError(f"{error.filename} is missing from the index; build it again")
            except UsageError as error:
                problem = error
            except (KeyError, TypeError, AttributeError) as error:  # values of other types
                file = folder / "manifest.json"
                problem = UsageError(f"{file} is damaged ({error}); build the index again")
            found = manifest
            manifest = read_index_manifest(folder)
            if manifest == found:
                break
            # a writer has replaced what the manifest named
        raise problem

    def __len__(self) -> int:
        return sum(segment.num_alive for segment in self.segments)

    @property
    def columns(self) -> pa.Schema | None:
        """The metadata's columns and their types, None for an index that holds nothing yet."""
        return self.segments[0].table.schema if self.segments else None

    # ---- rows ------------------------------------------------------------------------------

    def _find(
        self, ids: Sequence[int] | Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Per segment that holds some of the ids: their places in `ids`, and their rows."""
        wanted = np.asarray(ids, np.int64)
        numbers = np.searchsorted(self._first, wanted, side="right") - 1
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            rows = self.segments[number].places(wanted[at]) if number >= 0 else np.full(1, -1)
            if (rows < 0).any():
                raise KeyError(int(wanted[at[rows < 0][0]]))
            yield self.segments[number], at, rows

    def rows(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """The metadata of ids, in the order given. Raises KeyError for an unknown one."""
        found: list[dict[str, Any]] = [{}] * len(ids)
        images = self.manifest.images
        for segment, at, places in self._find(ids):
            for row, columns in zip(at.tolist(), segment.rows(places), strict=True):
                if images and columns.get("modified") is not None:  # a photo, in its folder
                    columns["shard"] = os.path.join(images, columns["key"])
                found[row] = columns
        return found

    def vectors(self, ids: Sequence[int], patch_size: Detail) -> Float[np.ndarray, "n d"]:
        """The stored vectors of ids, float32. Raises KeyError for an unknown one."""
        out = np.zeros((len(ids), self.width), np.float32)
        for segment, at, places in self._find(ids):
            with self._lock:
                out[at] = segment.reconstruct(patch_size, places)
        return out

    def known_vectors(
        self, ids: Sequence[int], patch_size: Detail
    ) -> dict[int, Float[np.ndarray, " d"]]:
        """`vectors` by id, without the unknown ones."""
        try:
            return dict(zip(ids, self.vectors(ids, patch_size), strict=True))
        except KeyError:
            held = set(self.ids().tolist())
            return self.known_vectors([id for id in ids if id in held], patch_size)

    def draw(self, count: int, seed: int | None = None) -> Int[np.ndarray, " n"]:
        """Ids at random, without repetition; fewer where there are fewer."""
        ids = self.ids()
        return np.random.default_rng(seed).choice(ids, min(count, len(ids)), replace=False)

    def column_values(self, name: str, most: int | None = None) -> pa.ChunkedArray:
        """What the living rows hold of a column, without nulls; or the first `most` rows of each
        segment."""
        assert self.columns is not None, "an index without rows has no columns"
        chunks: list[pa.Array] = []
        for segment in self.segments:
            column = segment.table[name].slice(0, most)
            if segment.num_alive < segment.count:
                column = column.filter(pa.array(segment.alive[:most]))
            chunks += (column.drop_null() if column.null_count else column).chunks
        return pa.chunked_array(chunks, self.columns.field(name).type)

    def ids(self, where: Where | None = None, most: int | None = None) -> Int[np.ndarray, " n"]:
        """The ids that a filter lets through, ascending, all without one; the first `most`."""
        chosen = [(segment, self._select(segment, where)) for segment in self.segments]
        ids = [segment.ids if one is None else segment.ids[one.mask] for segment, one in chosen]
        return np.concatenate([np.zeros(0, np.int64), *ids])[:most]

    # ---- search ----------------------------------------------------------------------------

    @cached_property
    def words(self) -> TextIndex:
        """The texts of all rows. Raises `UsageError` for an index without their words."""
        if not self.has_words:
            problem = (
                lacking() or f"{self.folder} lacks the words of its texts, or has damaged ones"
            )
            raise UsageError(f"{problem}; {WORDS_AGAIN.format(self.folder)}")
        return TextIndex([TextSegment(s.words, s.ids, s.alive) for s in self.segments if s.words])

    @property
    def has_words(self) -> bool:
        """Whether rows can be found by the words of their texts."""
        return all(segment.words is not None for segment in self.segments)

    def matching_words(
        self,
        query: WordQuery,
        where: Where | None = None,
        least_share: float = 0.0,
        of_best: float = 0.0,
    ) -> Matches:
        """The rows that share words with a query, best first, see `TextIndex.match`.

        Raises `UsageError` for an index without words, or whose words are damaged.
        """
        chosen = [self._select(segment, where) for segment in self.segments]
        masks = [None if one is None else one.mask for one in chosen]
        try:
            return self.words.match(query, masks, least_share, of_best)
        except DamagedWordsError as error:
            raise UsageError(f"{error}; {WORDS_AGAIN.format(self.folder)}") from error

    def nearest(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        exact: bool = False,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(similarities, ids), best first; -1 where fewer than k match.

        where: only rows that it lets through. nprobe, ef: for this call, instead of what was
        measured when the index was built. exact: scan everything.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        found: list[Found] = []
        for segment in self.segments:
            chosen = self._select(segment, where)
            if chosen is None or chosen.count:
                similarities, rows = self._nearest_in(
                    segment, queries, k, patch_size, chosen, nprobe, ef, exact
                )
                ids = segment.ids.take(rows, mode="clip")
                if rows.min(initial=0) < 0:  # fewer than k: seldom, and slow to look for
                    ids[rows < 0], similarities[rows < 0] = -1, -np.inf
                found.append((similarities, ids))
        return _best(found, len(queries), k)

    def _nearest_in(
        self,
        segment: Segment,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        chosen: Selection | None,
        nprobe: int | None,
        ef: int | None,
        exact: bool,
    ) -> Found:
        """(similarities, rows of the segment), as many as k or as there are."""
        index, tuning = segment.indexes[patch_size], segment.tuning(patch_size)
        share = 1.0 if chosen is None else chosen.count / segment.count
        k = min(k, segment.count if chosen is None else chosen.count)
        packed = None if chosen is None else chosen.packed
        copy = self._gpu.get((segment.number, patch_size))
        if isinstance(copy, ExactVectors):
            try:
                return copy.nearest(queries, k, chosen)
            except RuntimeError as error:  # without memory, for torch or for cuBLAS
                say_cpu_searches(error)
        if exact or share < tuning.exact_below:
            return nearest_exactly(index, queries, k, packed)
        nprobe, found = nprobe or tuning.nprobe, None
        if isinstance(copy, ListsOnGpus):
            found = copy.nearest(queries, k, nprobe, tuning.k_factor, chosen)
        similarities, rows = found or nearest(
            index, queries, k, nprobe, max(ef or tuning.ef, k), packed, tuning.k_factor
        )
        if rows.min(initial=0) < 0:  # approximate search found fewer than k; rescan exactly
            short = (rows < 0).any(axis=1)
            again = nearest_exactly(index, queries[short], k, packed)
            similarities[short], rows[short] = again
        return similarities, rows

    def count_matching(self, where: Where | None) -> int:
        """How many images a filter lets through."""
        chosen = [(segment, self._select(segment, where)) for segment in self.segments]
        return sum(segment.count if one is None else one.count for segment, one in chosen)

    def _select(self, segment: Segment, where: Where | None) -> Selection | None:
        """The rows that may be found, None for all."""
        if where is None and segment.num_alive == segment.count:
            return None
        if isinstance(where, NamedFilter):
            key = segment.number, where.name
        elif callable(where):
            return Selection.of(matching(segment.table, where) & segment.alive)
        else:
            key = segment.number, written(where)
        with self._lock:
            if key in self._selections:
                self._selections.move_to_end(key)
                return self._selections[key]
        mask = segment.alive
        if where is not None:
            mask = matching(segment.table, where) & mask
        chosen = Selection.of(mask)
        with self._lock:
            self._selections[key] = chosen
            if len(self._selections) > KEPT_FILTERS * max(1, len(self.segments)):
                self._selections.popitem(last=False)
        return chosen


def _best(
    found: Sequence[tuple[np.ndarray, np.ndarray]], count: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of what the segments found for `count` queries, equal ones by id; -1 where there
    are fewer."""
    missing = k - sum(part[0].shape[1] for part in found)
    if missing > 0:
        nothing = np.full((count, missing), -np.inf, np.float32)
        found = [*found, (nothing, np.full((count, missing), -1))]
    similarities, ids = found[0]
    if len(found) > 1:
        similarities = np.concatenate([part[0] for part in found], axis=1)
        ids = np.concatenate([part[1] for part in found], axis=1)
    if len(found) > 1 or not (similarities[:, 1:] < similarities[:, :-1]).all():
        order = np.lexsort((ids, -similarities))[:, :k]
        similarities = np.take_along_axis(similarities, order, 1)
        ids = np.take_along_axis(ids, order, 1)
    return similarities, ids
