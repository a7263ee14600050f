"""One sample by number: random access to local shards, and the checks that every sample passes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Literal, TypeVar, cast

from jaxtyping import Float
from torch import Tensor

from data.captions import read_captions
from data.errors import UsageError
from data.images import ImageTransform, decode_image
from data.problems import BadSample, SampleError
from data.shards import TEXT_COLUMNS, ShardIndex, Summary, load_index, read_member

OnError = Literal["skip", "raise"]
K = TypeVar("K")
V = TypeVar("V")


class SampleStore:
    """Samples of local shards by (shard, sample) number, with the last few shards kept open.

    One per process: files and indices are opened where they are used, so it can be sent to loader
    workers before or after use.
    """

    def __init__(self, shards: Sequence[str], index_dir: str, keep: int) -> None:
        """`keep`: how many shards stay open, and how many indices in memory."""
        self._shards = shards
        self._index_dir = index_dir
        self._keep = keep
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        empty: dict[str, object] = {"_indices": OrderedDict(), "_files": OrderedDict()}
        return self.__dict__ | empty

    def close(self) -> None:
        """Close the files that this process has open; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def index(self, shard: int) -> ShardIndex:
        return recall(
            self._indices,
            shard,
            lambda: load_index(self._shards[shard], self._index_dir),
            keep=self._keep,
        )

    def image(self, shard: int, index: int) -> bytes:
        """The image member's bytes. Raises `BadSample` ("unreadable")."""
        table = self.index(shard)
        return self._read(shard, int(table.image_offset[index]), int(table.image_size[index]))

    def texts(self, shard: int, index: int) -> dict[str, bytes]:
        """The text members' bytes by extension. Raises `BadSample` ("unreadable")."""
        table = self.index(shard)
        return {
            ext: self._read(
                shard, int(table.text_offset[index, column]), int(table.text_size[index, column])
            )
            for column, ext in enumerate(TEXT_COLUMNS)
            if table.text_offset[index, column] >= 0
        }

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            file = recall(
                self._files,
                shard,
                lambda: cast(BinaryIO, open(self._shards[shard], "rb", buffering=0)),  # noqa: SIM115
                keep=self._keep,
                drop=lambda old: old.close(),
            )
            return read_member(file, offset, size)
        except (OSError, EOFError) as error:
            raise BadSample("unreadable", str(error)) from None


def recall(
    cache: "OrderedDict[K, V]",
    key: K,
    make: Callable[[], V],
    *,
    keep: int,
    drop: Callable[[V], None] = lambda old: None,
) -> V:
    """`cache[key]`, made when absent; the least recently used beyond `keep` are dropped."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > keep:
            drop(cache.popitem(last=False)[1])
    cache.move_to_end(key)
    return cache[key]


def decode_pixels(
    data: bytes, transform: ImageTransform, max_pixels: int
) -> Float[Tensor, "3 s s"]:
    """What the tower is given for one image member. Raises `BadSample`."""
    return transform(decode_image(data, max_pixels))


def read_label(texts: Mapping[str, bytes]) -> int:
    """KEY.cls, -1 where there is none. Raises `BadSample` ("bad_label")."""
    if "cls" not in texts:
        return -1
    text = texts["cls"].strip()
    if not text.isdigit() or len(text) > 9:
        raise BadSample("bad_label", f"{text[:40]!r} is no class number")
    return int(text)


def find_captions(texts: Mapping[str, bytes], required: bool) -> tuple[str, ...]:
    """All captions. Where none is required, () for whatever is wrong with them."""
    try:
        return read_captions(texts)
    except BadSample:
        if required:
            raise
        return ()


def raise_first(shards: Sequence[str], summaries: Sequence[Summary]) -> None:
    """Raise `SampleError` for the first shard whose headers showed a problem."""
    for shard, summary in zip(shards, summaries, strict=True):
        if summary.first_problem is not None:
            raise SampleError.at(shard, summary.first_problem)


def check_loading(num_workers: int, max_pixels: int) -> None:
    """Raises `UsageError` for values that cannot work."""
    if num_workers < 0:
        raise UsageError(f"num_workers is {num_workers}, allowed are 0 and more")
    if max_pixels < 1:
        raise UsageError(f"max_pixels is {max_pixels}, allowed are 1 and more")
