"""What searching, the service and its page need of an index, wherever it lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from data.errors import UsageError
from retrieval.detail import Detail
from retrieval.index.config import Device
from retrieval.index.filters import Where
from retrieval.index.manifest import IndexManifest
from retrieval.words.asked import WordQuery
from retrieval.words.ranking import Matches


class IndexUnavailable(UsageError):  # noqa: N818, as `Stopped`
    """An index on another machine does not answer, or not in time. One sentence."""


@runtime_checkable
class IndexState(Protocol):
    """One state of an index. Safe for threads. Raises `IndexUnavailable` where it is elsewhere and
    does not answer."""

    @property
    def manifest(self) -> IndexManifest:
        """What it says of itself."""

    @property
    def kept(self) -> Path:
        """Folder for what is kept beside the index: refined vectors, measurements."""

    @property
    def generation(self) -> int:
        """Changes since the build."""

    @property
    def width(self) -> int: ...

    @property
    def patch_sizes(self) -> tuple[Detail, ...]: ...

    @property
    def columns(self) -> pa.Schema | None:
        """The metadata's columns and their types, None for an index that holds nothing yet."""

    def __len__(self) -> int: ...

    def rows(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """The metadata of ids, in the order given. Raises KeyError for an unknown one."""

    def vectors(self, ids: Sequence[int], patch_size: Detail) -> Float[np.ndarray, "n d"]:
        """The stored vectors of ids, float32. Raises KeyError for an unknown one."""

    def known_vectors(
        self, ids: Sequence[int], patch_size: Detail
    ) -> Mapping[int, Float[np.ndarray, " d"]]:
        """`vectors` by id, without the unknown ones."""

    def ids(self, where: Where | None = None, most: int | None = None) -> Int[np.ndarray, " n"]:
        """The ids that a filter lets through, ascending; the first `most` of them."""

    def count_matching(self, where: Where | None) -> int:
        """How many images a filter lets through."""

    def draw(self, count: int, seed: int | None = None) -> Int[np.ndarray, " n"]:
        """Ids at random, without repetition; fewer where there are fewer."""

    def column_values(self, name: str, most: int | None = None) -> pa.ChunkedArray:
        """What a column holds, without nulls: of `most` rows or a few more, or as many as can be
        read at once."""

    @property
    def has_words(self) -> bool:
        """Whether images are found by the words of their texts."""

    def matching_words(
        self,
        query: WordQuery,
        where: Where | None = None,
        least_share: float = 0.0,
        of_best: float = 0.0,
    ) -> Matches:
        """The rows that share words with a query, see `retrieval.words`. Raises `UsageError` where
        there are none of words."""

    def nearest(
        self,
        queries: Float[np.ndarray, "q d"],
        k: int,
        patch_size: Detail,
        where: Where | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(similarities, ids), best first; -1 where fewer than k match."""


@runtime_checkable
class IndexPlace(Protocol):
    """Where an index lies. `str` of it is how users name it."""

    @property
    def is_remote(self) -> bool:
        """Whether another machine searches it, which may let a thread wait."""

    def manifest(self) -> IndexManifest:
        """Of its present state. Raises `UsageError` where there is no index."""

    def model(self, manifest: IndexManifest) -> str:
        """The folder of its model, or its name on a hub."""

    def open(self, device: Device) -> IndexState:
        """Its present state. Raises `UsageError`."""

    def check(self, manifest: IndexManifest, intact: set[str] | None = None) -> None:
        """Raises `UsageError` for damage. intact: see `check_index`."""

    def stamp(self) -> tuple[int, ...]:
        """Changes when the index may have changed. Takes no time."""
