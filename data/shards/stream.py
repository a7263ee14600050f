"""Shards read from their start to their end, wherever they lie."""

from collections.abc import Iterator
from typing import Any

from data.errors import UsageError
from data.problems import Problem
from data.shards.members import ForwardFile, compression_of
from data.shards.names import check_pipe, is_compressed
from data.shards.tar import TarSample, iter_samples


def open_shard(shard: str, allow_pipe: bool = False) -> Any:
    """A file object of tar bytes; a file whose name says that it is compressed is decompressed.

    How it is compressed its first bytes say. Raises `UsageError` for a `pipe:` that is not allowed
    and for a compression that cannot be read here, `OSError` or `ValueError` where fsspec cannot
    open it.
    """
    check_pipe(shard, allow_pipe)
    if shard.startswith("pipe:"):
        from webdataset.gopen import gopen  # its import costs seconds

        return gopen(shard)
    import fsspec

    file = fsspec.open(shard, "rb").open()
    return _decompressed(file, shard) if is_compressed(shard) else file


def _decompressed(file: Any, shard: str) -> Any:
    from fsspec.compression import compr

    found = compression_of(file.read(8))
    file.seek(0)
    if found is None:  # lzma without the marks of xz, or not compressed
        return compr["lzma"](file, mode="rb") if shard.lower().endswith(".lzma") else file
    name = {"bzip2": "bz2"}.get(found[0], found[0])
    if name not in compr:
        raise UsageError(
            f"shard {shard!r} is compressed by {name}, which no installed package reads; unpack it"
        )
    return compr[name](file, mode="rb")


def iter_stream(shard: str, allow_pipe: bool = False) -> Iterator[TarSample | Problem]:
    """Samples of a shard read forward, with their bytes. Raises what the file system raises."""
    with open_shard(shard, allow_pipe) as file:
        yield from iter_samples(ForwardFile(file), read_payloads=True)
        if shard.startswith("pipe:"):  # a program complains if nobody reads the padding at its end
            for _ in range(64):
                if not file.read(1 << 16):
                    break
