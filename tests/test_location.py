"""Images by location: the bytes that the shard holds, None where they cannot be read."""

import builtins
import os
from pathlib import Path

import pytest
from shard_maker import png, write_shards

from data.errors import UsageError
from data.shards.index import load_index
from data.shards.location import ImageLocation, read_image, read_images


def locations(shard: str) -> list[ImageLocation]:
    index = load_index(shard)
    images = [row for row, ext in enumerate(index.exts) if ext == "png"]
    return [ImageLocation(shard, int(index.offsets[r]), int(index.sizes[r])) for r in images]


def test_bytes_are_those_of_the_shard_in_any_order(tmp_path: Path) -> None:
    first, second = (locations(shard) for shard in write_shards(tmp_path, [3, 2]))
    wanted = [png(i) for i in (0, 1, 2, 1000, 1001)]
    assert list(read_images(first + second)) == wanted
    assert list(read_images([*second, *first][::-1])) == [*wanted[3:], *wanted[:3]][::-1]
    assert [read_image(location) for location in first] == wanted[:3]


def test_an_image_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(7))
    assert read_image(ImageLocation(str(tmp_path / "photo.png"), 0, len(png(7)))) == png(7)


def test_what_cannot_be_read_is_none_among_many_and_raised_alone(tmp_path: Path) -> None:
    good = locations(write_shards(tmp_path, [2])[0])
    gone, program = ImageLocation(str(tmp_path / "gone.tar"), 0, 9), ImageLocation("pipe:ls", 0, 9)
    read = list(read_images([good[0], gone, good[1], program, gone, good[0]]))
    assert read == [png(0), None, png(1), None, None, png(0)]
    with pytest.raises(FileNotFoundError):
        read_image(gone)
    with pytest.raises(UsageError, match="allow_pipe"):
        read_image(program)


def test_neighbours_share_one_opening_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path, [3, 2])
    wanted = [location for shard in shards for location in locations(shard)]
    opened: list[str] = []
    really_open = builtins.open

    def noted(file: object, *args: object, **options: object) -> object:
        opened.append(str(file))
        return really_open(file, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", noted)
    reading = read_images(wanted)
    next(reading)
    del reading  # whoever stops early has nothing to close
    assert [file for file in opened if file in shards] == shards[:1]
    assert len(list(read_images(wanted))) == 5
    assert [file for file in opened if file in shards] == [*shards[:1], *shards]
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not set(links) & set(shards)
