"""Captions read once: what the cache gives is what the shards would have given."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from shard_maker import TRANSFORM, sample, write_tar

from data.cache.captions import _SCHEMA, CaptionCache
from data.cache.checksums import IntactFiles
from data.config import DataConfig
from data.errors import UsageError
from data.pipeline.captioned import CaptionedPipeline


@dataclass(frozen=True)
class Letters:
    """A tokenizer: one id per character."""

    fingerprint: str = "letters"
    pad_id: int = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(char) for char in text] for text in texts]


BUILD = {"seed": 3, "global_batch_size": 8, "rank": 0, "world_size": 1, "tokenizer": Letters()}


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Several captions, one caption, none, and text that is not UTF-8."""
    members = [*sample("a", 1, ["one", "two", "three"]), *sample("b", 2), ("c.png", b"x")]
    members += [("d.png", b"x"), ("d.txt", b"\xff"), *sample("e", 3, ["\u732b", "cat"])]
    first = write_tar(tmp_path / "0.tar", members)
    return [first, write_tar(tmp_path / "1.tar", sample("z", 4))]


def fill(folder: Path, shards: list[str]) -> CaptionCache:
    cache = CaptionCache(folder, shards, Letters(), "")
    for shard in cache.missing(range(len(shards))):
        cache.write(shard)
    return cache


def test_cached_batches_equal_those_read_from_shards(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    read = DataConfig(shards=tuple(shards), num_workers=0)
    cached = dataclasses.replace(read, features=str(tmp_path / "cache"))
    seen, kinds = set(), set()
    pairs = zip(
        CaptionedPipeline(read, None, **BUILD).batches(0, 12),
        CaptionedPipeline(cached, None, **BUILD).batches(0, 12),
        strict=True,
    )
    for expected, got in pairs:
        for field in ("keys", "captions", "errors"):
            assert getattr(got, field) == getattr(expected, field)
        for field in ("concepts", "valid", "shards", "indices", "views"):
            assert torch.equal(getattr(got, field), getattr(expected, field))
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.tokens.tolist() == [[ord(char) for char in text] for text in got.captions]
        seen |= set(got.captions)
        kinds |= set(got.errors)
    assert kinds == {"no_caption", "not_utf8"}
    assert seen == {"one", "two", "three", "caption of b", "\u732b", "cat", "caption of z", ""}


def test_a_cached_step_opens_no_shard(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    cfg = DataConfig(shards=tuple(shards), num_workers=0, features=str(tmp_path / "cache"))
    batches = CaptionedPipeline(cfg, None, **BUILD).batches(0, 2)
    first = next(batches)
    for shard in shards:
        Path(shard).write_bytes(b"gone")
    second = next(batches)
    assert int(first.valid.sum() + second.valid.sum()) > 8


def test_what_is_damaged_or_absent_is_written_again(tmp_path: Path, shards: list[str]) -> None:
    cache = fill(tmp_path / "cache", shards)
    file = tmp_path / "cache" / "1.texts.letters.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert cache.missing([0, 1]) == [1]
    file.unlink()
    assert cache.missing([0, 1]) == [1]
    assert fill(tmp_path / "cache", shards).missing([0, 1]) == []
    other = CaptionCache(tmp_path / "cache", shards, Letters("other"), "")
    assert other.missing([0, 1]) == [0, 1]


def test_captions_edited_in_place_are_noticed(tmp_path: Path, shards: list[str]) -> None:
    cache = fill(tmp_path / "cache", shards)
    tar = Path(shards[1])
    tar.write_bytes(tar.read_bytes().replace(b"caption of z", b"picture of z"))
    assert cache.missing([0]) == []
    with pytest.raises(UsageError, match="computed from other contents of shard"):
        cache.missing([1])


def test_bad_captions_are_raised_where_asked(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    folder = str(tmp_path / "cache")
    cfg = DataConfig(shards=tuple(shards), num_workers=0, features=folder, on_error="raise")
    with pytest.raises(Exception, match=r"0\.tar.*(no_caption|not_utf8)"):
        list(CaptionedPipeline(cfg, None, **BUILD).batches(0, 1))


def test_views_are_drawn_per_epoch_and_stay_the_same(tmp_path: Path, shards: list[str]) -> None:
    cfg = DataConfig(shards=(shards[1],), num_workers=0, views=3, crop=0.3, flip=True)
    build = BUILD | {"global_batch_size": 1}
    pixels: dict[int, torch.Tensor] = {}
    for batch in CaptionedPipeline(cfg, TRANSFORM, **build).batches(0, 30):
        view = int(batch.views[0])
        assert torch.equal(pixels.setdefault(view, batch.images), batch.images)
    assert set(pixels) == {0, 1, 2}
    assert not torch.equal(pixels[1], pixels[2])
    plain = dataclasses.replace(cfg, views=1, crop=1.0, flip=False)
    (batch,) = CaptionedPipeline(plain, TRANSFORM, **build).batches(0, 1)
    assert torch.equal(batch.images, pixels[0])


@pytest.mark.parametrize(
    "wrong", [{"views": 0}, {"views": 2}, {"flip": True}, {"views": 2, "crop": 0.0}]
)
def test_views_that_make_no_sense_are_refused(wrong: dict, shards: list[str]) -> None:
    with pytest.raises(UsageError, match=r"data\.(views|crop)"):
        CaptionedPipeline(DataConfig(shards=tuple(shards), **wrong), None, **BUILD)


def test_captions_that_an_earlier_version_lost_are_read_again(tmp_path: Path) -> None:
    bad = [("a.png", b"x"), ("a.json", b"[]"), ("a.txt", b"a cat")]
    shards = [
        write_tar(tmp_path / "0.tar", bad),
        write_tar(tmp_path / "1.tar", [*sample("b", 1), ("c.png", b"x")]),
    ]
    cache = fill(tmp_path / "cache", shards)
    for number in range(2):  # as it was written then
        path = next((tmp_path / "cache").glob(f"{number}.texts.*.arrow"))
        rows = pa.ipc.open_file(path).read_all().to_pylist()
        if number == 0:
            rows[0] |= {"captions": [], "tokens": [], "problem": "bad_json", "cause": "no object"}
        table = pa.Table.from_pylist(rows, schema=_SCHEMA.remove_metadata())

        def write(file: object, table: pa.Table = table) -> None:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        IntactFiles(tmp_path / "cache", shards[number]).write(path.name, write)
    cache = CaptionCache(tmp_path / "cache", shards, Letters(), "")
    assert cache.missing(range(2)) == [0]
    cache.write(0)
    assert cache.missing(range(2)) == []
    assert cache.columns(0).captions.to_pylist() == ["a cat"]
