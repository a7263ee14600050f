"""Cached captions on disk: those of whole shards with their token ids, tokenised once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from data.cache.checksums import IntactFiles
from data.captions import SampleCaptions, Tokenizer
from data.problems import Problem, attempt
from data.shards.index import load_index
from data.shards.names import shard_name
from data.shards.store import SampleStore
from data.shards.tar import TarSample
from data.token_ids import TokenIds

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.list_(pa.int32()))),
        ("concept", pa.int64()),
        ("problem", pa.string()),  # why the sample has no captions; null where it has
        ("cause", pa.string()),
    ],
    metadata={"reading": "2"},
)
# Files without this mark may miss captions for what is wrong in another member of the sample.
_ONCE_LOST = ("bad_json", "empty_caption", "not_utf8")


@dataclass(frozen=True)
class CaptionColumns:
    """The n samples of a shard with their c captions, on the memory map of its file.

    Arrow keeps lists as flat values and offsets, so nothing is copied or read before it is used.
    """

    keys: pa.StringArray  # n
    first: Int[np.ndarray, " bounds"]  # sample i has the captions first[i] to first[i + 1]
    captions: pa.StringArray  # c
    tokens: TokenIds  # of c texts
    concepts: Int[np.ndarray, " n"]
    good: Bool[np.ndarray, " n"]  # whether the sample has captions
    problems: pa.StringArray  # n: the kind, null where good
    causes: pa.StringArray  # n

    @classmethod
    def of(cls, table: pa.Table) -> "CaptionColumns":
        """Of a table of `CaptionCache`."""
        column = {name: table[name].combine_chunks() for name in table.column_names}
        texts = column["tokens"].values
        return cls(
            keys=column["key"],
            first=column["captions"].offsets.to_numpy(),
            captions=column["captions"].values,
            tokens=TokenIds(texts.values.to_numpy(), texts.offsets.to_numpy()),
            concepts=column["concept"].to_numpy(),
            good=column["problem"].is_null().to_numpy(zero_copy_only=False),
            problems=column["problem"],
            causes=column["cause"],
        )

    def problem(self, number: int) -> Problem:
        """Why sample `number` is bad."""
        columns = (self.problems, self.keys, self.causes)
        return Problem(*(column[number].as_py() for column in columns))


class CaptionCache:
    """DIR/SHARD.texts.FINGERPRINT.arrow: a row per sample, in the shard's order, memory-mapped."""

    def __init__(
        self,
        folder: str | Path,
        shards: Sequence[str],
        tokenizer: Tokenizer,
        index_dir: str,
        keep: int = 128,
    ) -> None:
        """`shards`: paths of local tars, in the pipeline's order. `keep`: maps that stay open."""
        self._arguments = folder, shards, tokenizer, index_dir, keep
        self._folder, self._shards, self._tokenizer = Path(folder), shards, tokenizer
        self._index_dir = index_dir
        self.columns = lru_cache(keep)(self._map_columns)

    def __reduce__(self) -> tuple[object, ...]:  # loader workers map the files anew
        return CaptionCache, self._arguments

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those of these shards (numbers) whose file is absent, damaged, or by an earlier version
        that lost captions.

        Raises `UsageError` where a shard has changed since its captions were read.
        """
        for shard in shards:
            self._files(shard).check_shard()
        return [s for s in shards if not (self._files(s).intact(self._name(s)) and self._whole(s))]

    def write(self, shard: int) -> int:
        """Read and tokenise the captions of a shard; returns its number of samples."""
        index = load_index(self._shards[shard], self._index_dir)
        store = SampleStore(self._shards, self._index_dir, keep=1)
        read = store.read(shard, range(len(index)), pixels=False, layout=index.summary.layout)
        found = [self._row(item) for item in read]
        ids = iter(self._tokenizer([text for row in found for text in row["captions"]]))
        for row in found:
            row["tokens"] = [next(ids) for _ in row["captions"]]
        table = pa.Table.from_pylist(found, schema=_SCHEMA)

        def write(file: object) -> None:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                writer.write_table(table.combine_chunks())

        self._files(shard).write(self._name(shard), write)
        return len(index)

    def _whole(self, shard: int) -> bool:
        table = self._map_table(shard)
        if table.schema.metadata:
            return True
        return not set(table["problem"].unique().to_pylist()) & set(_ONCE_LOST)

    def _row(self, sample: TarSample | Problem) -> dict[str, Any]:
        row: dict[str, Any] = {"key": sample.key, "captions": [], "problem": None, "concept": 0}
        if isinstance(sample, TarSample):
            members = sample.payloads
            read = attempt(sample.key, lambda: SampleCaptions.of(sample.key, members))
        else:
            read = sample
        if isinstance(read, Problem):
            return row | {"problem": read.kind, "cause": read.cause}
        return row | {"captions": read.captions, "concept": read.concept}

    def _map_columns(self, shard: int) -> CaptionColumns:
        return CaptionColumns.of(self._map_table(shard))

    def _map_table(self, shard: int) -> pa.Table:
        with pa.memory_map(str(self._folder / self._name(shard))) as file:
            return pa.ipc.open_file(file).read_all()

    def _name(self, shard: int) -> str:
        return f"{shard_name(self._shards[shard])}.texts.{self._tokenizer.fingerprint}.arrow"

    def _files(self, shard: int) -> IntactFiles:
        return IntactFiles(self._folder, self._shards[shard])
