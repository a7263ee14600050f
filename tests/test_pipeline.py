"""The pipeline: every good sample exactly once, whatever reads it, whatever else is wrong."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from hostile_images import many_scans
from shard_maker import TRANSFORM, png, sample, write_shards, write_tar

from data import decode_apart
from data.batch import Batch
from data.captions import concept_id
from data.config import DataConfig
from data.errors import DataError, UsageError
from data.images import decode_image
from data.pipeline.captioned import CaptionedPipeline
from data.pipeline.reader import ShardReader
from data.pipeline.training import PART_SAMPLES
from data.problems import SampleError

COUNTS = [5, 1, 9, 2]  # 17 samples
Slot = tuple[str, str, bool]


def build(
    shards: list[str] | tuple[str, ...],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch: int = 4,
    seed: int = 0,
    pixels: bool = False,
    **options: object,
) -> CaptionedPipeline:
    cfg = replace(DataConfig(shards=tuple(shards), num_workers=0, block_shards=2), **options)
    return CaptionedPipeline(
        cfg,
        TRANSFORM if pixels else None,
        seed=seed,
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
    )


def slots(batches: Iterator[Batch]) -> list[Slot]:
    return [
        (key, caption, bool(good))
        for batch in batches
        for key, caption, good in zip(batch.keys, batch.captions, batch.valid, strict=True)
    ]


def global_slots(shards: list[str], world_size: int, steps: int, **options: object) -> list[Slot]:
    ranks = [
        list(build(shards, rank=r, world_size=world_size, **options).batches(0, steps))
        for r in range(world_size)
    ]
    return [slot for step in zip(*ranks, strict=True) for batch in step for slot in slots([batch])]


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[list[str], set[str], dict[str, int], dict[str, int]]:
    """Shards with every kind of damage; the good keys; bad samples by headers and by content."""
    bad = [
        ("b0.png", b"<html>no</html>"),
        ("b0.txt", b"x"),
        ("b1.png", png(1, (64, 64))),  # above max_pixels
        ("b1.txt", b"x"),
        ("b2.png", png(2)),  # no caption
        ("b3.png", png(3)),
        ("b3.txt", b"  \n"),
        ("b4.png", png(4)),
        ("b4.txt", b"\xff\xfe\xfa"),
        ("b5.png", png(5)[:200]),
        ("b5.txt", b"x"),
        ("b6.png", png(6)),
        ("b6.json", b"{"),
    ]
    first = [*sample("g0", 10), *bad[:7], *sample("g1", 11, ["one", "two", "three"])]
    second = [*bad[7:], *sample("g2", 12), ("t.txt", b"x"), *sample("g2", 13), *sample("g3", 14)]
    cut = Path(write_tar(tmp_path / "2.tar", [*sample("g4", 15), *sample("lost", 16)]))
    cut.write_bytes(cut.read_bytes()[: 512 * 6 + 100])
    shards = [
        write_tar(tmp_path / "0.tar", first),
        write_tar(tmp_path / "1.tar", second),
        str(cut),
        write_tar(tmp_path / "3.tar", []),
    ]
    in_headers = {"duplicate_key": 1, "no_image": 1, "truncated": 1}
    in_content = dict.fromkeys(
        ["not_an_image", "image_too_large", "no_caption", "empty_caption", "not_utf8"], 1
    )
    return (
        shards,
        {"g0", "g1", "g2", "g3", "g4"},
        in_headers,
        in_content
        | {
            "truncated_image": 1,
            "bad_json": 1,
        },
    )


def test_every_sample_comes_exactly_once_per_epoch(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    seen = slots(build(shards).batches(0, 17))  # 4 epochs of 17, in batches of 4
    wanted = {f"s{shard}_{i:03d}" for shard, count in enumerate(COUNTS) for i in range(count)}
    for epoch in range(4):
        keys = [key for key, _, good in seen[epoch * 17 : (epoch + 1) * 17] if good]
        assert Counter(keys) == Counter(wanted)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_order(tmp_path: Path, world_size: int) -> None:
    shards = write_shards(tmp_path, COUNTS)
    one = global_slots(shards, 1, 6)
    assert global_slots(shards, world_size, 6) == one


def test_workers_and_pixels_do_not_change_the_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    one = slots(build(shards).batches(0, 6))
    assert slots(build(shards, num_workers=2).batches(0, 6)) == one
    assert slots(build(shards, num_workers=2, pixels=True).batches(0, 6)) == one


def test_any_step_can_be_resumed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    whole = list(build(shards, pixels=True).batches(0, 12))
    for start, workers in ((1, 0), (7, 2), (11, 1)):
        pipeline = build(shards, pixels=True, num_workers=workers)
        for old, new in zip(whole[start:], pipeline.batches(start, 12 - start), strict=True):
            assert (new.step, new.keys, new.captions) == (old.step, old.keys, old.captions)
            assert torch.equal(new.images, old.images)
            assert torch.equal(new.concepts, old.concepts)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(build(shards, num_workers=workers).batches(0, 2))
        list(ShardReader(shards, None, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_slots_hold_their_own_pixels_captions_and_places(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    pipeline = build(shards, pixels=True)
    assert pipeline.shards == shards
    assert pipeline.num_samples == 17
    for batch in pipeline.batches(0, 5):
        for row, key in enumerate(batch.keys):
            shard, index = int(batch.shards[row]), int(batch.indices[row])
            assert key == f"s{shard}_{index:03d}"
            assert batch.captions[row] == f"caption of {key}"
            assert batch.concepts[row] == concept_id([f"caption of {key}"])
            image = decode_image(png(1000 * shard + index), 1000)
            assert torch.equal(batch.images[row], TRANSFORM.square(image))


def test_captions_are_drawn_anew_each_epoch_and_concepts_stay(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    shard = write_tar(tmp_path / "0.tar", [*sample("x", 0, names), *sample("y", 1, names)])
    batches = list(build([shard], batch=2).batches(0, 40))
    for key in ("x", "y"):
        drawn = [caption for k, caption, _ in slots(batches) if k == key]
        assert set(drawn) == set(names)
    assert {int(c) for batch in batches for c in batch.concepts} == {concept_id(names)}
    assert slots(build([shard], batch=2).batches(30, 10)) == slots(batches[30:])


def test_a_batch_may_be_larger_than_the_dataset_and_than_a_part(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3, 4])
    size = PART_SAMPLES + 44
    (batch,) = build(shards, batch=size, pixels=True, num_workers=2).batches(1, 1)
    assert len(batch) == size == len(batch.images)
    whole = slots(build(shards, batch=1).batches(size, size))
    assert slots([batch]) == whole


def test_more_ranks_and_workers_than_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3])
    one = global_slots(shards, 1, 3)
    assert global_slots(shards, 4, 3) == one
    assert slots(build(shards, num_workers=2).batches(0, 3)) == one


def test_weighted_sources_get_their_shares(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    big, small = write_shards(tmp_path / "a", [20, 20]), write_shards(tmp_path / "b", [2])
    patterns = (f"{tmp_path}/a/*.tar", small[0])
    pipeline = build(patterns, weights=(3.0, 1.0), batch=64)
    assert pipeline.shards == [*big, *small]
    batches = list(pipeline.batches(0, 16))
    shards = torch.cat([batch.shards for batch in batches])
    assert (shards == 2).sum() == len(shards) // 4
    assert slots(build(patterns, weights=(3.0, 1.0), batch=64).batches(9, 7)) == slots(batches[9:])


def test_a_shard_in_two_sources_keeps_one_number(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [4, 4])
    pipeline = build((shards[1], f"{tmp_path}/*.tar"), weights=(1.0, 1.0), batch=64)
    assert pipeline.shards == [shards[1], shards[0]]  # as expand_shards numbers them
    for batch in pipeline.batches(0, 4):
        for key, shard in zip(batch.keys, batch.shards.tolist(), strict=True):
            assert key.startswith(f"s{1 - shard}_")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_input_is_skipped_and_counted_and_every_good_sample_delivered(
    damaged: tuple, workers: int
) -> None:
    shards, good, in_headers, in_content = damaged
    pipeline = build(shards, batch=4, pixels=True, num_workers=workers, max_pixels=1000)
    assert pipeline.problems == in_headers
    assert pipeline.num_samples == len(good) + 7
    for epoch in range(2):
        batches = list(pipeline.batches(3 * epoch, 3))
        assert Counter(key for key, _, ok in slots(batches) if ok) == Counter(good)
        counted = Counter[str]()
        for batch in batches:
            counted.update(batch.errors)
            for row in (~batch.valid).nonzero().flatten().tolist():
                assert batch.captions[row] == ""
                assert batch.images[row].count_nonzero() == 0
        assert counted == in_content


def test_order_of_cached_and_uncached_runs_is_the_same_on_bad_input(damaged: tuple) -> None:
    shards = damaged[0]
    pixels = build(shards, pixels=True, max_pixels=1000).batches(0, 6)
    cached = build(shards).batches(0, 6)
    assert [b.keys for b in pixels] == [b.keys for b in cached]


@pytest.mark.parametrize("workers", [0, 1])
def test_raising_names_shard_key_and_cause(tmp_path: Path, workers: int) -> None:
    members = [*sample("good", 0), ("bad.png", b"<html>"), ("bad.txt", b"x")]
    shard = write_tar(tmp_path / "0.tar", members)
    pipeline = build([shard], pixels=True, on_error="raise", num_workers=workers)
    with pytest.raises(SampleError, match=r"0\.tar.*'bad'.*not_an_image"):
        list(pipeline.batches(0, 2))
    reader = ShardReader([shard], TRANSFORM, on_error="raise", num_workers=workers)
    with pytest.raises(SampleError, match=r"0\.tar.*'bad'.*not_an_image"):
        list(reader)


def test_a_picture_that_would_take_minutes_is_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_apart, "BASE_S", 0.1)
    members = [*sample("a", 0), ("bad.jpg", many_scans()), ("bad.txt", b"x"), *sample("b", 1)]
    shard = write_tar(tmp_path / "0.tar", members)
    reader = ShardReader([shard], TRANSFORM, num_workers=1)
    assert [key for batch in reader for key in batch.keys] == ["a", "b"]
    assert reader.errors == {"image_too_costly": 1}
    (batch,) = build([shard], batch=3, pixels=True, num_workers=1).batches(0, 1)
    assert (batch.errors, int(batch.valid.sum())) == ({"image_too_costly": 1}, 2)


def test_no_shard_stays_open_between_batches(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, COUNTS)
    for batches in (build(shards).batches(0, 4), iter(ShardReader(shards, None, num_workers=0))):
        next(batches)  # the generator is alive: whoever drops it has nothing to close
        opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert not set(opened) & set(shards)


def test_raising_names_what_the_headers_showed(damaged: tuple) -> None:
    for shard, what in ((damaged[0][2], "'lost'.*truncated"), (damaged[0][1], "'t'.*no_image")):
        with pytest.raises(SampleError, match=what):
            build([shard], on_error="raise")
        with pytest.raises(SampleError, match=what):
            list(ShardReader([shard], None, on_error="raise", num_workers=0))


def test_a_shard_that_vanishes_costs_its_samples_and_no_others(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3, 3])
    pipeline = build(shards, batch=6)
    Path(shards[0]).unlink()
    (batch,) = pipeline.batches(0, 1)
    assert batch.errors == {"unreadable": 3}
    assert torch.equal(batch.valid, batch.shards == 1)


def replace_tar(shard: str, members: list[tuple[str, bytes]]) -> None:
    """In one step, as a loader beside it may read at any moment."""
    os.replace(write_tar(Path(shard).with_suffix(".new"), members), shard)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_shard_replaced_in_mid_run_stops_it(tmp_path: Path, num_workers: int, when: str) -> None:
    """Whether a loader has read its index already or not; skipping bad samples does not help."""
    (shard,) = write_shards(tmp_path, [40])
    batches = build([shard], batch=4, num_workers=num_workers).batches(0, 10)
    if when == "between":
        next(batches)
    keys = [f"s0_{number:03d}" for number in range(40)]
    replace_tar(shard, [m for key in keys for m in sample(key, 7, [f"other {key}"])])
    with pytest.raises(DataError, match=r"shard .*0000.tar' was replaced while it was being read"):
        list(batches)


def test_a_shard_that_is_only_touched_in_mid_run_is_read_on(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [8])
    wanted = [batch.keys for batch in build([shard], batch=4).batches(0, 4)]
    batches = build([shard], batch=4).batches(0, 4)
    found = [next(batches).keys]
    os.utime(shard, ns=(1, 1))
    found += [batch.keys for batch in batches]
    assert found == wanted


def test_a_reader_stops_at_a_shard_that_is_replaced(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [40])
    for num_workers in (0, 1):
        batches = iter(ShardReader([shard], TRANSFORM, batch_size=4, num_workers=num_workers))
        next(batches)
        replace_tar(shard, [m for i in range(41 + num_workers) for m in sample(f"k{i}", i)])
        with pytest.raises(DataError, match="was replaced while it was being read"):
            list(batches)


def test_impossible_values_are_refused_in_a_sentence(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3])
    empty = write_tar(tmp_path / "empty.tar", [])
    for shards_, options, message in (
        (shards, {"batch": 5, "world_size": 2}, "global_batch_size 5: .*multiples.*2"),
        (shards, {"weights": (1.0, 2.0)}, "data.weights has 2 values for 1 data.shards"),
        (shards, {"weights": (-1.0,)}, "positive"),
        (shards, {"num_workers": -1}, "data.num_workers -1: at least 0"),
        (shards, {"seed": -1}, "seed -1"),
        ([f"{tmp_path}/no*.tar"], {}, "no shard matches"),
        ([empty], {}, "no good sample in 1 shards; skipped: none"),
        ([__file__], {}, "no good sample in 1 shards; skipped: not_a_tar 1"),
        (["memory://x/0.tar"], {}, "seek"),
    ):
        with pytest.raises(UsageError, match=message):
            build(shards_, **options)


def test_damaged_and_empty_shards_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut, text = *write_shards(tmp_path, [3, 4]), str(tmp_path / "list.tar")
    Path(cut).write_bytes(Path(cut).read_bytes()[:700])
    Path(text).write_text("url,caption\n")
    build([whole, cut, text])
    assert capsys.readouterr().err == (
        f"warning: damaged or empty shards: {cut} (truncated), {text} (not_a_tar)\n"
    )


def test_fingerprint_tells_another_order(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [3, 4])
    one = build(shards).fingerprint()
    assert build(shards, num_workers=2, batch=7).fingerprint() == one
    others = [build(shards, seed=1), build(shards[::-1]), build(shards, block_shards=1)]
    assert one not in {pipeline.fingerprint() for pipeline in others}


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[list[str]]:
    fs = fsspec.filesystem("memory")
    members = [*sample("bad", 0)[:1], ("bad.txt", b" "), ("no.png", b"x"), ("no.txt", b"x")]
    shards = write_shards(tmp_path, [6, 3])
    shards.append(write_tar(tmp_path / "0002.tar", [*members, *sample("s2_000", 2000)]))
    for shard in shards:
        fs.pipe(f"/far/{Path(shard).name}", Path(shard).read_bytes())
    yield [f"memory://far/{Path(shard).name}" for shard in shards]
    fs.rm("/far", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_give_full_batches_of_good_samples(remote: list[str], workers: int) -> None:
    pipeline = build(remote, pixels=True, num_workers=workers, batch=8, world_size=2, rank=1)
    assert pipeline.num_samples is None
    batches = list(pipeline.batches(0, 30))
    assert [batch.step for batch in batches] == list(range(30))
    assert all(len(batch) == 4 and batch.valid.all() for batch in batches)
    seen = Counter(key for key, _, _ in slots(batches))
    assert len(seen) == 10
    counted = sum((Counter(batch.errors) for batch in batches), Counter())
    assert set(counted) == {"empty_caption", "not_an_image"}
    for row, key in enumerate(batches[0].keys):
        shard, index = int(batches[0].shards[row]), int(key[3:])
        image = decode_image(png(1000 * shard + index), 1000)
        assert torch.equal(batches[0].images[row], TRANSFORM.square(image))


def test_streams_differ_between_ranks_workers_and_starts(remote: list[str]) -> None:
    def keys(rank: int, workers: int, start: int) -> list[str]:
        pipeline = build(
            remote, pixels=True, batch=32, world_size=2, rank=rank, num_workers=workers
        )
        return [key for key, _, _ in slots(pipeline.batches(start, 2))]

    one = keys(0, 0, 0)
    assert one == keys(0, 0, 0)
    assert one != keys(1, 0, 0)
    assert one != keys(0, 0, 5)
    two = keys(0, 2, 0)
    assert two[:16] != two[16:]


def test_streams_mix_by_weight(remote: list[str]) -> None:
    pipeline = build(remote, pixels=True, weights=(8.0, 1.0, 1.0), batch=100)
    shards = torch.cat([batch.shards for batch in pipeline.batches(0, 5)])
    assert 0.7 < (shards == 0).float().mean() < 0.9


def test_streams_without_anything_good_end_in_an_error(tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "0.tar", [("a.txt", b"x")])
    for url in (f"pipe:cat {bad}", f"pipe:cat {tmp_path}/nothing 2>/dev/null"):
        pipeline = build([url], pixels=True, allow_pipe=True)
        with pytest.raises(SampleError, match="no sample in the last"):
            list(pipeline.batches(0, 1))
    pipeline = build([f"pipe:cat {bad}"], pixels=True, allow_pipe=True, on_error="raise")
    with pytest.raises(SampleError, match=r"'a'.*no_image"):
        list(pipeline.batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_reader_gives_good_samples_in_shard_order(damaged: tuple, workers: int) -> None:
    shards, good, in_headers, in_content = damaged
    reader = ShardReader(
        shards,
        TRANSFORM,
        batch_size=3,
        num_workers=workers,
        need_captions=True,
        max_pixels=1000,
    )
    for _ in range(2):  # it can be iterated again
        batches = list(reader)
        assert [key for batch in batches for key in batch.keys] == sorted(good)
        assert reader.errors == in_headers | in_content
    assert [batch.shard for batch in batches] == sorted(batch.shard for batch in batches)
    for batch in batches:
        data = Path(reader.shards[batch.shard]).read_bytes()
        for row, (offset, size) in enumerate(zip(batch.offsets, batch.sizes, strict=True)):
            image = decode_image(data[offset : offset + size], 1000)
            assert torch.equal(batch.images[row], TRANSFORM.square(image))
    captions = {k: c for batch in batches for k, c in zip(batch.keys, batch.captions, strict=True)}
    assert captions["g1"] == ("one", "two", "three")


def test_reader_keeps_pictures_without_captions_where_none_are_needed(damaged: tuple) -> None:
    shards, good = damaged[:2]
    reader = ShardReader(shards, TRANSFORM, num_workers=0, max_pixels=1000)
    captions = {
        key: text for batch in reader for key, text in zip(batch.keys, batch.captions, strict=True)
    }
    assert set(captions) == good | {"b2", "b3", "b4", "b6"}
    assert captions["b2"] == captions["b4"] == ()


def test_reader_gives_labels(tmp_path: Path) -> None:
    members = [
        *sample("a", 0), ("a.cls", b"12\n"), *sample("b", 1), *sample("c", 2), ("c.cls", b"cat")
    ]  # fmt: skip
    reader = ShardReader([write_tar(tmp_path / "0.tar", members)], None, num_workers=0)
    (batch,) = reader
    assert batch.labels.tolist() == [12, -1, -1]
    assert batch.images is None
    assert reader.errors == {"bad_label": 1}


def test_reader_gives_the_same_from_afar(tmp_path: Path, remote: list[str]) -> None:
    near = [f"{tmp_path}/{Path(url).name}" for url in remote]
    for mixed in (remote, [near[0], remote[1], near[2]]):
        far_reader = ShardReader(mixed, TRANSFORM, batch_size=4, num_workers=0)
        near_reader = ShardReader(near, TRANSFORM, batch_size=4, num_workers=0)
        for far, here in zip(far_reader, near_reader, strict=True):
            assert (far.keys, far.captions, far.shard) == (here.keys, here.captions, here.shard)
            for name in ("images", "labels", "indices", "offsets", "sizes"):
                assert torch.equal(getattr(far, name), getattr(here, name)), name
        assert far_reader.errors == near_reader.errors == {"not_an_image": 1}


def test_reader_raises_what_keeps_a_shard_from_being_read(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, [3])[0]
    reader = ShardReader([f"pipe:cat {shard}; exit 3"], None, allow_pipe=True)
    with pytest.raises(OSError, match="exit 3"):
        list(reader)
