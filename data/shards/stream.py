"""Shards read from their start to their end, wherever they lie."""

from collections.abc import Iterator
from typing import Any

from data.problems import Problem
from data.shards.names import check_pipe
from data.shards.tar import ForwardFile, TarSample, iter_samples


def open_shard(shard: str, allow_pipe: bool = False) -> Any:
    """A file object of tar bytes, decompressed by the ending of its name.

    Raises `UsageError` for a `pipe:` that is not allowed, `OSError` or `ValueError` where fsspec
    cannot open it.
    """
    check_pipe(shard, allow_pipe)
    if shard.startswith("pipe:"):
        from webdataset.gopen import gopen  # its import costs seconds

        return gopen(shard)
    import fsspec

    return fsspec.open(shard, "rb", compression="infer").open()


def iter_stream(shard: str, allow_pipe: bool = False) -> Iterator[TarSample | Problem]:
    """Samples of a shard read forward, with their bytes. Raises what the file system raises."""
    with open_shard(shard, allow_pipe) as file:
        yield from iter_samples(ForwardFile(file), read_payloads=True)
        if shard.startswith("pipe:"):  # a program complains if nobody reads the padding at its end
            for _ in range(64):
                if not file.read(1 << 16):
                    break
