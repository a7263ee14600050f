"""The feature cache: rows belong to samples, and a cache that does not fit is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from forked import run
from shard_maker import TRANSFORM, png, sample, write_shards, write_tar

from data.cache.features import FeatureCache
from data.config import DataConfig
from data.errors import UsageError
from data.pipeline.captioned import CaptionedPipeline
from data.pipeline.reader import ShardReader
from data.shards.index import load_index

TOWER = "tower/transform/float32"


def fill(folder: Path, shards: list[str], patch_sizes: tuple[int, ...] = (8, 16)) -> None:
    """A cache whose 'features' are the picture's first pixels plus the patch size."""
    cache = FeatureCache(folder, TOWER, shards, patch_sizes)
    cache.claim(4)
    for batch in ShardReader(shards, TRANSFORM, batch_size=100, num_workers=0):
        for size in patch_sizes:
            features = batch.images[:, 0, 0, :4].numpy() + np.float32(size)
            cache.write(batch.shard, size, 0, batch.keys, features)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards, the second with a picture that cannot be decoded in its middle."""
    first = write_shards(tmp_path, [5])[0]
    members = [*sample("a", 50), ("b.png", b"x"), ("b.txt", b"x"), *sample("c", 51)]
    return [first, write_tar(tmp_path / "0001.tar", members)]


def test_cached_features_equal_those_of_the_pixels(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    cache = FeatureCache(tmp_path / "cache", TOWER, shards, [8, 16])
    assert cache.missing() == []
    assert cache.width == 4
    build = {"seed": 0, "global_batch_size": 4, "rank": 0, "world_size": 1}
    cfg = DataConfig(shards=tuple(shards), num_workers=0)
    for batch in CaptionedPipeline(cfg, TRANSFORM, **build).batches(0, 6):
        for size in (8, 16):
            features, valid = cache.lookup(batch.shards.numpy(), batch.indices.numpy(), size)
            assert features.dtype == np.float32
            assert (valid == batch.valid.numpy()).all()
            expected = batch.images[:, 0, 0, :4].numpy() + np.float32(size)
            assert (features[valid] == expected[valid]).all()
            assert (features[~valid] == 0).all()


def test_rows_follow_the_keys_file(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    assert (tmp_path / "cache" / "0001.keys.txt").read_text() == "a\nc\n"
    assert np.load(tmp_path / "cache" / "0001.p8.npy").shape == (2, 4)
    cache = FeatureCache(tmp_path / "cache", TOWER, shards, [8])
    assert isinstance(cache._features(1, 8, 0), np.memmap)


def test_what_is_missing_is_listed_and_the_rest_reused(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    assert FeatureCache(folder, TOWER, shards, [8]).missing() == [(0, {0: (8,)}), (1, {0: (8,)})]
    fill(folder, shards[:1], (8,))
    cache = FeatureCache(folder, TOWER, shards, [8, 16])
    assert cache.missing() == [(0, {0: (16,)}), (1, {0: (8, 16)})]
    with pytest.raises(UsageError, match=r"0000\.p16\.npy"):
        cache.lookup(np.array([0]), np.array([0]), 16)
    fill(folder, shards)
    assert FeatureCache(folder, TOWER, shards, [8, 16]).missing() == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["shards"]["0001"] == {"size": os.path.getsize(shards[1]), "samples": 3}
    assert not list(folder.glob(".*"))


def test_a_batch_over_many_shards_and_views_is_read_row_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = write_shards(tmp_path, rng.integers(1, 9, 40).tolist())
    cache = FeatureCache(tmp_path / "cache", TOWER, shards, [8], views=2, augment_fingerprint="f")
    cache.claim(3)
    known: dict[tuple[int, int, int], np.ndarray] = {}
    sizes = []
    for shard, path in enumerate(shards):
        keys = load_index(path).keys
        good = [number for number in range(len(keys)) if rng.random() < 0.8]
        sizes.append(len(keys))
        for view in (0, 1):
            rows = rng.standard_normal((len(good), 3)).astype(np.float16)
            cache.write(shard, 8, view, [keys[number] for number in good], rows)
            known |= {(shard, n, view): row for n, row in zip(good, rows, strict=True)}
    picked = rng.integers(0, 40, 300)
    indices = rng.integers(0, np.array(sizes)[picked])
    views = rng.integers(0, 2, 300)
    features, valid = cache.lookup(picked, indices, 8, views)
    assert features.dtype == np.float32
    found = [known.get(place) for place in zip(picked, indices, views, strict=True)]
    assert valid.tolist() == [row is not None for row in found]
    assert 30 < valid.sum() < 290
    assert features.tolist() == [[0.0] * 3 if row is None else row.tolist() for row in found]


def test_a_shard_without_good_pictures_has_no_rows(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [("a.png", b"x")])
    cache = FeatureCache(tmp_path / "cache", TOWER, [shard], [8])
    cache.claim(4)
    cache.write(0, 8, 0, [], np.empty((0, 4), np.float32))
    assert cache.missing() == []
    features, valid = cache.lookup(np.array([0]), np.array([0]), 8)
    assert features.shape == (1, 4)
    assert not valid.any()


def test_a_cache_that_does_not_fit_says_what_differs(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    with pytest.raises(UsageError, match=r"computed by tower tower/.*this run has tower other"):
        FeatureCache(folder, "other", shards, [8])
    with pytest.raises(UsageError, match=r"width 4.*gives 5"):
        FeatureCache(folder, TOWER, shards, [8]).claim(5)
    write_tar(Path(shards[0]), [*sample("z", 1)])
    with pytest.raises(UsageError, match=r"shard '0000' had \d+ bytes"):
        FeatureCache(folder, TOWER, shards, [8])


def test_same_size_and_other_samples_are_noticed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", sample("a", 1))
    fill(tmp_path / "cache", [shard], (8,))
    write_tar(Path(shard), sample("b", 1))
    cache = FeatureCache(tmp_path / "cache", TOWER, [shard], [8])
    with pytest.raises(UsageError, match="does not have"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    with pytest.raises(UsageError, match="other samples"):
        cache.write(0, 16, 0, ["b"], np.zeros((1, 4), np.float32))


def test_a_shard_edited_in_place_is_noticed(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [3])
    fill(tmp_path / "cache", [shard])
    data = Path(shard).read_bytes()
    Path(shard).write_bytes(data.replace(b"caption of s0_001", b"caption of s0_00X"))
    assert Path(shard).read_bytes() != data
    cache = FeatureCache(tmp_path / "cache", TOWER, [shard], [8, 16])
    with pytest.raises(UsageError, match=r"computed from other contents of shard '.*0000\.tar'"):
        cache.missing()
    Path(shard).write_bytes(data)  # as it was, at another time
    assert FeatureCache(tmp_path / "cache", TOWER, [shard], [8, 16]).missing() == []


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    (folder / "0000.p8.npy").write_bytes(b"junk")
    cache = FeatureCache(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match="no array"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    np.save(folder / "0000.p8.npy", np.zeros((2, 4), np.float32))
    cache = FeatureCache(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match=r"\(2, 4\).*\(5, 4\)"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    noted = json.loads((folder / "manifest.json").read_text())
    for shards_noted in ([], {"0000": 5}, {"0000": {"size": 5}}):
        (folder / "manifest.json").write_text(json.dumps(noted | {"shards": shards_noted}))
        with pytest.raises(UsageError, match="no feature cache's manifest"):
            FeatureCache(folder, TOWER, shards, [8])
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="no feature cache's manifest"):
        FeatureCache(folder, TOWER, shards, [8])
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="no manifest"):
        FeatureCache(folder, TOWER, shards, [8])


def test_a_file_is_no_cache(tmp_path: Path, shards: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file, name a folder"):
        FeatureCache(tmp_path / "file", TOWER, shards, [8])


def test_nothing_in_a_cache_is_unpickled(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    np.save(folder / "0000.p8.npy", np.array([print], dtype=object), allow_pickle=True)
    cache = FeatureCache(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match="no array"):
        cache.lookup(np.array([0]), np.array([0]), 8)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "swapped", "keys", "sums"])
def test_damaged_files_count_as_missing_and_the_rest_stays(
    damage: str, tmp_path: Path, shards: list[str]
) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    path = folder / "0000.p8.npy"
    data = bytearray(path.read_bytes())
    expected: list[tuple[int, dict[int, tuple[int, ...]]]] = [(0, {0: (8,)})]
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        before = path.stat().st_mtime_ns
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before, before))  # as a failing disk leaves it
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "swapped":
        path.write_bytes((folder / "0000.p16.npy").read_bytes())
    elif damage == "keys":
        (folder / "0000.keys.txt").write_text("x\n")
        expected = [(0, {0: (8, 16)})]
    else:
        (folder / "0000.sums.json").write_text("{")
        expected = [(0, {0: (8, 16)})]
    assert FeatureCache(folder, TOWER, shards, [8, 16]).missing() == expected
    fill(folder, shards)
    cache = FeatureCache(folder, TOWER, shards, [8, 16])
    assert cache.missing() == []
    assert cache.lookup(np.array([0]), np.array([4]), 8)[1].all()


def test_a_copied_cache_is_used_and_its_shards_are_read_once(
    tmp_path: Path, shards: list[str]
) -> None:
    fill(tmp_path / "cache", shards)
    for path in (*(tmp_path / "cache").iterdir(), *shards):  # a copy that forgets the times
        os.utime(path, ns=(1, 1))
    assert FeatureCache(tmp_path / "cache", TOWER, shards, [8, 16]).missing() == []
    noted = json.loads((tmp_path / "cache" / "0000.sums.json").read_text())
    assert noted["shard"]["mtime_ns"] == 1


def test_views_have_files_of_their_own_and_one_way_of_being_made(
    tmp_path: Path, shards: list[str]
) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards, (8,))
    cache = FeatureCache(folder, TOWER, shards, [8], views=2, augment_fingerprint="flip")
    assert cache.missing() == [(0, {1: (8,)}), (1, {1: (8,)})]
    cache.claim(4)
    keys = [f"s0_{i:03d}" for i in range(5)]
    cache.write(0, 8, 1, keys, np.full((5, 4), 7, np.float32))
    assert (folder / "0000.p8.view1.npy").exists()
    features, _ = cache.lookup(np.zeros(2, int), np.array([3, 3]), 8, np.array([0, 1]))
    assert (features[1] == 7).all()
    assert (features[0] != 7).any()
    with pytest.raises(UsageError, match=r"views of 'flip'.*needs 'crop'"):
        FeatureCache(folder, TOWER, shards, [8], views=2, augment_fingerprint="crop")
    FeatureCache(folder, TOWER, shards, [8], augment_fingerprint="crop")  # no views, no matter


def test_a_disk_that_takes_no_more_is_one_sentence_and_what_is_complete_stays(
    tmp_path: Path, shards: list[str]
) -> None:
    """In a process of its own that may write files of 1 kB at most."""
    program = f"""
import resource, signal, sys
import numpy as np
from data.errors import UsageError
from data.cache.features import FeatureCache
cache = FeatureCache({str(tmp_path / "cache")!r}, "tower", {shards!r}, [8])
cache.claim(400)
cache.write(1, 8, 0, [], np.zeros((0, 400), np.float32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    cache.write(0, 8, 0, list("abcde"), np.zeros((5, 400), np.float32))
except UsageError as error:
    print(error)
print(cache.missing())
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    sentence, missing = done.stdout.splitlines()
    assert "0000.p8.npy' cannot be written (" in sentence
    assert "what is complete stays" in sentence
    assert missing == "[(0, {0: (8,)})]"
    assert not list((tmp_path / "cache").glob(".*"))


def test_shards_of_one_file_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [("x.png", png(0))])
    shards = [f"{tmp_path}/{name}/0.tar" for name in ("a", "b")]
    with pytest.raises(UsageError, match="same file name"):
        FeatureCache(tmp_path / "cache", TOWER, shards, [8])
    with pytest.raises(UsageError, match="stream"):
        FeatureCache(tmp_path / "cache", TOWER, ["memory://x/0.tar"], [8])
