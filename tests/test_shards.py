"""Shards: patterns, indices, and every way a tar can be wrong."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_maker import png, sample, write_shards, write_tar

from data.errors import UsageError
from data.problems import Problem
from data.shards.index import ShardIndex, load_index, load_summaries
from data.shards.members import ForwardFile
from data.shards.names import expand_shards, is_local
from data.shards.stream import iter_stream
from data.shards.tar import TarSample, iter_samples


def read_all(shard: str, **options: str) -> tuple[list[str], dict[str, int]]:
    """Keys and problems by random access; reading forward must say the same."""
    index = load_index(shard, **options)
    forward = list(iter_stream(shard))
    samples = [item for item in forward if isinstance(item, TarSample)]
    kinds = [item.kind for item in forward if isinstance(item, Problem)]
    assert [item.key for item in samples] == index.keys
    assert {kind: kinds.count(kind) for kind in kinds} == index.summary.problems
    with open(shard, "rb") as file:
        for row, item in enumerate(samples):
            assert index.read(file, row, pixels=True) == item
            assert item.image_ext not in index.read(file, row, pixels=False).payloads
    return index.keys, index.summary.problems


def test_index_equals_what_tarfile_finds(tmp_path: Path) -> None:
    members = [*sample("a", 1), *sample("dir.d/b", 2, ["x", "y"]), ("dir.d/b.cls", b"3")]
    shard = write_tar(tmp_path / "0.tar", members)
    index = load_index(shard)
    assert index.keys == ["a", "dir.d/b"]
    with tarfile.open(shard) as tar:
        wanted = {info.name: (info.offset_data, info.size) for info in tar}
    with open(shard, "rb") as file:
        samples = [index.read(file, number, pixels=True) for number in range(2)]
    found = {f"{each.key}.{ext}": span for each in samples for ext, span in each.spans.items()}
    assert found == wanted
    assert [each.image_ext for each in samples] == ["png", "png"]
    assert read_all(shard) == (["a", "dir.d/b"], {})


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    long = "/".join(["folder" * 5] * 4) + "/" + "k" * 60
    keys = [long, "käse/ключ", "plain", "./dotted"]
    if format != tarfile.USTAR_FORMAT:
        keys.append("x" * 300)
    members = [member for i, key in enumerate(keys) for member in sample(key, i)]
    shard = write_tar(tmp_path / "0.tar", members, format=format, encoding="utf-8")
    assert read_all(shard) == (keys, {})


def test_links_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("README", "a.md", "__meta__/a.json", "._a.png", "a.seg.npy"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
        for name, data in sample("b", 1):
            info = tarfile.TarInfo(name.upper() if name.endswith("png") else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    keys, problems = read_all(str(path))
    assert keys == ["B"]
    assert problems == {
        "link": 2,
        "special_file": 1,
        "unknown_suffix": 1,  # README; a.md and a.seg.npy belong to sample a, whose image is a link
        "no_image": 1,  # b.txt: keys differ by case
    }


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_samples_whose_members_are_links_are_counted(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("a", "b", "c"):
            for name, data in sample(key, 1):
                info = tarfile.TarInfo(name)
                if (key, name) in {("b", "b.png"), ("c", "c.txt")}:
                    info.type, info.linkname = kind, "a" + name[1:]
                    tar.addfile(info)
                else:
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    assert read_all(str(path)) == (["a", "c"], {"link": 2})


@pytest.mark.parametrize(
    ("names", "keys", "problems"),
    [
        ("v1.5.png v1.5.txt v1.6.png v1.6.txt", ["v1.5", "v1.6"], {}),
        ("v1.5.png v1.6.PNG v1.5.txt v1.6.txt", ["v1.5", "v1.6"], {}),
        ("2024.01.02.jpg 2024.01.03.jpg", ["2024.01.02", "2024.01.03"], {}),
        ("a.d/v1.5.png a.d/v1.5.png b.png", ["a.d/v1.5", "b"], {"duplicate_key": 1}),
        ("v1.5.png v2.png v1.6.png v1.5.png", ["v1.5", "v2", "v1.6"], {"duplicate_key": 1}),
        # a sample as webdataset has it stays one; further images in it are counted
        ("0.jpg 0.seg.png 0.seg.npy 0.txt 1.jpg", ["0", "1"], {"ambiguous_name": 1}),
        ("0.depth.png 0.jpg 0.en.txt", ["0"], {"ambiguous_name": 1}),
        ("v1.5.png v1.5.txt v1.png v1.txt", ["v1"], {"ambiguous_name": 1}),
        ("0.jpg 1.jpg 0.seg.png", ["0", "1"], {"ambiguous_name": 1}),
        ("0.jpg 0.png", ["0"], {"second_image": 1}),
        ("0.in.jpg 0.out.jpg 0.txt", ["0.in", "0.out"], {"no_image": 1}),
        ("v1.5.txt", [], {"no_image": 1}),
        ("0.jpg 0.npy 0.xml", ["0"], {}),
        ("0.psd 0.txt", [], {"no_image": 1}),
        ("0.psd 1.psd 2.md README .hidden.png ._0.png", [], {"unknown_suffix": 5}),
        ("noend png", [], {"unknown_suffix": 2}),
    ],
)
def test_every_image_is_read_or_counted(
    tmp_path: Path, names: str, keys: list[str], problems: dict[str, int]
) -> None:
    members = [(name, name.encode()) for name in names.split()]
    shard = write_tar(tmp_path / "0.tar", members)
    assert read_all(shard) == (keys, problems)
    by_place = {data: name for name, data in members}
    for item in iter_stream(shard):
        if isinstance(item, TarSample):
            for ext, data in item.payloads.items():
                assert by_place[data].lower() == f"{item.key}.{ext}".lower()


def test_names_with_dots_do_not_wait_in_memory_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.tar._MAX_WAITING", 2000)
    members = [member for n in range(40) for member in sample(f"v1.{n}", n)]
    held = 0
    with open(write_tar(tmp_path / "0.tar", members), "rb") as file:
        for item in iter_samples(ForwardFile(file), read_payloads=True):
            assert isinstance(item, TarSample)
            assert len(item.payloads) == 2
            held = max(held, file.tell() - item.spans["txt"][0])
    assert held < 20_000  # of 100,000, the archive's padding at its end included
    assert read_all(str(tmp_path / "0.tar")) == ([f"v1.{n}" for n in range(40)], {})


def test_truncated_names_with_dots_keep_what_is_complete(tmp_path: Path) -> None:
    shard = Path(write_tar(tmp_path / "0.tar", [*sample("v1.5", 1), *sample("v1.6", 2)]))
    index = load_index(str(shard))
    shard.write_bytes(shard.read_bytes()[: int(index.offsets[2]) + 9])
    assert read_all(str(shard)) == (["v1.5"], {"truncated": 1})


def test_archives_behind_the_first_are_read(tmp_path: Path) -> None:
    one, two = (Path(shard) for shard in write_shards(tmp_path, [2, 3]))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    keys = load_index(str(one)).keys + load_index(str(two)).keys
    assert read_all(str(both)) == (keys, {})
    both.write_bytes(one.read_bytes() + b"rubbish" * 500)
    assert read_all(str(both)) == (load_index(str(one)).keys, {"trailing_data": 1})
    both.write_bytes(one.read_bytes()[:-100] + bytes(7000))
    assert read_all(str(both)) == (load_index(str(one)).keys, {})


def test_an_index_of_what_counted_as_a_sample_before_is_built_anew(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", sample("v1.5", 1))
    load_index(shard)
    file = tmp_path / "0.index.parquet"
    table = pq.read_table(file)
    record = json.loads(table.schema.metadata[b"flexilit"])
    record["shard"]["format"] = 1
    record["summary"]["num_samples"] = 0
    pq.write_table(table[:0].replace_schema_metadata({"flexilit": json.dumps(record)}), file)
    assert load_summaries([shard])[0].num_samples == 1
    assert load_index(shard).keys == ["v1.5"]


def test_truncation_keeps_every_sample_that_is_complete(tmp_path: Path) -> None:
    whole = Path(write_shards(tmp_path, [4])[0]).read_bytes()
    index = load_index(str(tmp_path / "0000.tar"))
    ends = (index.offsets + index.sizes)[index.starts[1:] - 1].tolist()  # of each sample's text
    rng = np.random.default_rng(0)
    for cut in [
        0,
        1,
        511,
        512,
        *ends,
        *(end - 1 for end in ends),
        *rng.integers(0, len(whole), 40),
    ]:
        shard = tmp_path / f"cut{cut}.tar"
        shard.write_bytes(whole[:cut])
        keys, problems = read_all(str(shard))
        complete = [key for key, end in zip(index.keys, ends, strict=True) if end <= cut]
        assert keys[: len(complete)] == complete
        assert len(keys) <= len(complete) + 1  # one more where only its text is lost
        if cut < index_end(whole):
            assert problems == {"truncated" if cut >= 512 else "not_a_tar": 1}


def index_end(data: bytes) -> int:
    """Where the end-of-archive marker starts, plus the one block that a reader needs."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.getmembers()
        return tar.offset - 512 if data[tar.offset - 512 : tar.offset] == bytes(512) else tar.offset


def test_a_damaged_header_ends_the_archive_where_it_is(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [4])[0])
    index = load_index(str(path))
    data = bytearray(path.read_bytes())
    data[int(index.offsets[index.starts[2]]) - 512] ^= 1
    path.write_bytes(data)
    assert read_all(str(path)) == (index.keys[:2], {"truncated": 1})


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"Z", b"0"])
@pytest.mark.parametrize("size", [-512, 1 << 41, 1 << 80])
def test_impossible_sizes_end_the_archive_where_they_are(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    header = tarfile.TarInfo("b.png")
    header.type, header.size = kind, size
    shard = Path(write_shards(tmp_path, [1])[0])
    whole = shard.read_bytes()[: index_end(shard.read_bytes())]
    shard.write_bytes(whole + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert read_all(str(shard)) == (["s0_000"], {"truncated": 1})


def test_files_that_are_no_tars(tmp_path: Path) -> None:
    for number, data in enumerate((b"<html>" * 500, png(0) * 3, b"url,caption\n", b"")):
        file = tmp_path / str(number)
        file.write_bytes(data)
        assert read_all(str(file)) == ([], {"not_a_tar": 1})


def test_of_duplicate_keys_the_first_is_kept(tmp_path: Path) -> None:
    members = [*sample("a", 1), *sample("b", 2), *sample("a", 3), *sample("c", 4), *sample("c", 5)]
    shard = write_tar(tmp_path / "0.tar", members)
    assert read_all(shard) == (["a", "b", "c"], {"duplicate_key": 2})
    (first,) = [s for s in iter_stream(shard) if isinstance(s, TarSample) and s.key == "c"]
    assert first.payloads["png"] == png(4)


def test_samples_without_an_image_and_bad_names_are_counted(tmp_path: Path) -> None:
    odd = ("caf\udce9.png", png(1))
    members = [("a.txt", b"x"), odd, *sample("b", 1), ("c\n.png", png(2)), ("d.png", b"")]
    shard = write_tar(tmp_path / "0.tar", members, encoding="utf-8", errors="surrogateescape")
    keys, problems = read_all(shard)
    assert keys == ["b", "d"]
    assert problems == {"no_image": 1, "not_utf8": 1, "bad_key": 1}


def test_random_damage_never_hangs_or_escapes(tmp_path: Path) -> None:
    whole = Path(write_shards(tmp_path, [3])[0]).read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(100):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) // 512, 4):
            data[place * 512 + rng.integers(0, 160)] = rng.integers(0, 256)
        shard = tmp_path / f"{trial}.tar"
        shard.write_bytes(data)
        read_all(str(shard))


def test_an_index_is_reused_until_the_shard_changes(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [2])[0]
    load_index(shard)
    file = tmp_path / "0000.index.parquet"
    built, data = file.stat(), file.read_bytes()
    assert load_index(shard).keys == ["s0_000", "s0_001"]
    assert file.stat().st_mtime_ns == built.st_mtime_ns
    write_tar(Path(shard), [*sample("x", 1), *sample("y", 2), *sample("z", 3)])
    assert load_index(shard).keys == ["x", "y", "z"]
    os.utime(shard, ns=(1, 1))
    assert load_index(shard).keys == ["x", "y", "z"]
    assert file.read_bytes() != data


@pytest.mark.parametrize("junk", [b"", b"PAR1junkPAR1", None])
def test_an_unusable_index_is_built_anew(tmp_path: Path, junk: bytes | None) -> None:
    shard, other = write_shards(tmp_path, [2, 3])
    if junk is None:  # another shard's
        load_index(other)
        junk = (tmp_path / "0001.index.parquet").read_bytes()
    (tmp_path / "0000.index.parquet").write_bytes(junk)
    assert load_summaries([shard])[0].num_samples == 2
    assert len(load_index(shard)) == 2


def test_a_flipped_bit_of_an_index_changes_nothing(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [*sample("a", 1), *sample("b", 2), ("c.txt", b"alone")])
    whole, file = load_index(shard), tmp_path / "0.index.parquet"
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(data), 150).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert load_summaries([shard]) == [whole.summary]
        found = load_index(shard)
        assert (found.keys, found.summary) == (whole.keys, whole.summary)
        for name in ("starts", "exts", "offsets", "sizes"):
            assert np.array_equal(getattr(found, name), getattr(whole, name))


def test_where_the_folder_cannot_be_written_the_users_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEXILIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    shard = write_shards(tmp_path / "shards", [2])[0]
    (tmp_path / "shards" / "0000.index.parquet").mkdir()  # nothing can be renamed to this name
    assert len(load_index(shard)) == 2
    assert len(list((tmp_path / "cache").rglob("0000-*.index.parquet"))) == 1
    assert sorted(os.listdir(tmp_path / "shards")) == ["0000.index.parquet", "0000.tar"]
    explicit = tmp_path / "explicit"
    assert len(load_index(shard, str(explicit))) == 2
    assert len(list(explicit.iterdir())) == 1


def test_concurrent_builders_all_get_the_whole_index(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [30])[0]
    start = threading.Barrier(8)

    def build() -> ShardIndex:
        start.wait()
        return load_index(shard)

    with ThreadPoolExecutor(8) as pool:
        indices = [future.result() for future in [pool.submit(build) for _ in range(8)]]
    assert all(index.keys == indices[0].keys for index in indices)
    assert sorted(os.listdir(tmp_path)) == ["0000.index.parquet", "0000.tar"]


def test_building_an_index_reads_headers_only(tmp_path: Path) -> None:
    members = [("a.png", bytes(50_000_000)), *sample("b", 1)]
    shard = write_tar(tmp_path / "0.tar", members)
    with open("/proc/self/io") as io_before:
        before = int(io_before.readline().split()[1])
    assert load_index(shard).keys == ["a", "b"]
    with open("/proc/self/io") as io_after:
        assert int(io_after.readline().split()[1]) - before < 1_000_000


def test_patterns_expand_braces_and_globs_in_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [1] * 4)
    assert expand_shards([f"{tmp_path}/{{0000..0002}}.tar"]) == shards[:3]
    assert expand_shards([f"{tmp_path}/*.tar"]) == shards
    assert expand_shards([f"{tmp_path}/*3.tar", f"{tmp_path}/*.tar"]) == [shards[3], *shards[:3]]
    assert expand_shards([f"file://{shards[0]}"]) == [shards[0]]
    strange = write_tar(tmp_path / "x[1]{2}.tar", sample("a", 1))
    assert expand_shards([strange]) == [strange]


@pytest.fixture
def memory_shards(tmp_path: Path) -> Iterator[list[str]]:
    fs = fsspec.filesystem("memory")
    for shard in write_shards(tmp_path, [2, 1]):
        fs.pipe(f"/remote/{Path(shard).name}", Path(shard).read_bytes())
    yield ["memory:///remote/0000.tar", "memory:///remote/0001.tar"]
    fs.rm("/remote", recursive=True)


def test_remote_shards_are_globbed_and_read_forward(memory_shards: list[str]) -> None:
    found = expand_shards(["memory://remote/*.tar"])
    assert [Path(url).name for url in found] == ["0000.tar", "0001.tar"]
    assert not any(map(is_local, found))
    items = [item for url in found for item in iter_stream(url)]
    assert [item.key for item in items] == ["s0_000", "s0_001", "s1_000"]


def test_compressed_shards_are_streams(tmp_path: Path) -> None:
    plain = write_shards(tmp_path, [2])[0]
    packed = f"{plain}.gz"
    Path(packed).write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert not is_local(packed)
    assert [item.key for item in iter_stream(packed)] == ["s0_000", "s0_001"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".tgz", gzip.compress),
        (".tar.GZ", gzip.compress),
        (".TGZ", gzip.compress),
        (".tbz2", bz2.compress),
        (".tar.bz2", bz2.compress),
        (".txz", lzma.compress),
        (".tar.xz", lzma.compress),
        (".tar.gz", bytes),  # not compressed at all
        (".tar.gz", bz2.compress),
    ],
)
def test_a_compressed_shard_is_read_whatever_its_suffix(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    plain = Path(write_shards(tmp_path, [2])[0])
    packed = tmp_path / f"packed{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert not is_local(str(packed))
    assert list(iter_stream(str(packed))) == list(iter_stream(str(plain)))


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (gzip.compress, "compressed by gzip, name it so that it ends in .gz"),
        (bz2.compress, "compressed by bzip2, .* ends in .bz2"),
        (lzma.compress, "compressed by xz, .* ends in .xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed by zstd"),
    ],
)
def test_a_compressed_shard_under_a_plain_name_is_named_as_what_it_is(
    tmp_path: Path, pack: Callable[[bytes], bytes], said: str
) -> None:
    plain = Path(write_shards(tmp_path, [2])[0])
    packed = tmp_path / "packed.tar"
    for size in (100, None):
        packed.write_bytes(pack(plain.read_bytes())[:size])
        assert read_all(str(packed)) == ([], {"compressed": 1})
        problem = load_index(str(packed)).summary.first_problem
        assert problem is not None
        assert re.search(said, problem.cause)


def test_a_compression_that_nothing_here_reads_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar.lz4"
    shard.write_bytes(b"\x04\x22\x4d\x18" + bytes(100))
    with pytest.raises(UsageError, match="compressed by lz4, which no installed package reads"):
        list(iter_stream(str(shard)))


def test_a_program_that_fails_is_an_error_and_not_a_short_shard(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [2])[0]
    with pytest.raises(OSError, match="exit 3"):
        list(iter_stream(f"pipe:cat {shard}; exit 3", allow_pipe=True))


def test_programs_run_only_when_allowed(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [2])[0]
    with pytest.raises(UsageError, match="allow_pipe"):
        expand_shards([f"pipe:cat {shard}"])
    with pytest.raises(UsageError, match="allow_pipe"):
        list(iter_stream(f"pipe:cat {shard}"))
    (pipe,) = expand_shards([f"pipe:cat {shard}"], allow_pipe=True)
    assert [item.key for item in iter_stream(pipe, allow_pipe=True)] == ["s0_000", "s0_001"]


@pytest.mark.parametrize("pattern", ["*.tar", "{0000..0001}.tar", "0009.tar"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "0000.tar").touch()
    folder = tmp_path / "none" if pattern == "*.tar" else tmp_path
    with pytest.raises(UsageError, match="no shard matches"):
        expand_shards([f"{folder}/{pattern}"])


def test_other_unusable_patterns_are_named() -> None:
    with pytest.raises(UsageError, match="no shards were given"):
        expand_shards([])
    with pytest.raises(UsageError, match="nosuch"):
        expand_shards(["nosuch://bucket/*.tar"])
