"""The feature cache: rows belong to samples, and a cache that does not fit is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from shard_maker import TRANSFORM, png, sample, write_shards, write_tar

from data.errors import UsageError
from data.features import FeatureCache, write_manifest, write_shard_features
from data.pipeline import DataConfig, ShardReader, TrainPipeline
from data.shards import shard_name

TOWER = "tower/transform/float32"


def fill(folder: Path, shards: list[str], patch_sizes: tuple[int, ...] = (8, 16)) -> None:
    """A cache whose 'features' are the picture's first pixels plus the patch size."""
    write_manifest(folder, TOWER, 4, shards)
    reader = ShardReader(shards, TRANSFORM, batch_size=100, num_workers=0)
    for batch in reader:
        name = shard_name(reader.shards[batch.shard])
        for size in patch_sizes:
            features = batch.images[:, 0, 0, :4].numpy() + np.float32(size)
            write_shard_features(folder, name, size, batch.keys, features)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards, the second with a picture that cannot be decoded in its middle."""
    first = write_shards(tmp_path, [5])[0]
    members = [*sample("a", 50), ("b.png", b"x"), ("b.txt", b"x"), *sample("c", 51)]
    return [first, write_tar(tmp_path / "0001.tar", members)]


def test_cached_features_equal_those_of_the_pixels(tmp_path: Path, shards: list[str]) -> None:
    fill(tmp_path / "cache", shards)
    cache = FeatureCache.open(tmp_path / "cache", TOWER, shards, [8, 16])
    assert cache.missing() == []
    assert cache.width == 4
    build = {"seed": 0, "global_batch_size": 4, "rank": 0, "world_size": 1}
    cfg = DataConfig(shards=tuple(shards), num_workers=0)
    for batch in TrainPipeline(cfg, TRANSFORM, **build).batches(0, 6):
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
    cache = FeatureCache.open(tmp_path / "cache", TOWER, shards, [8])
    assert isinstance(cache._features(1, 8), np.memmap)


def test_what_is_missing_is_listed_and_the_rest_reused(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    assert FeatureCache.open(folder, TOWER, shards, [8]).missing() == [
        (shards[0], (8,)),
        (shards[1], (8,)),
    ]
    fill(folder, shards[:1], (8,))
    cache = FeatureCache.open(folder, TOWER, shards, [8, 16])
    assert cache.missing() == [(shards[0], (16,)), (shards[1], (8, 16))]
    with pytest.raises(UsageError, match=r"0001\.p8\.npy"):
        cache.lookup(np.array([1]), np.array([0]), 8)
    fill(folder, shards)
    assert FeatureCache.open(folder, TOWER, shards, [8, 16]).missing() == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["shards"]["0001"] == {"size": os.path.getsize(shards[1]), "samples": 3}
    assert not list(folder.glob(".*"))


def test_a_shard_without_good_pictures_has_no_rows(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [("a.png", b"x")])
    write_manifest(tmp_path / "cache", TOWER, 4, [shard])
    write_shard_features(tmp_path / "cache", "0", 8, [], np.empty((0, 4), np.float32))
    cache = FeatureCache.open(tmp_path / "cache", TOWER, [shard], [8])
    assert cache.missing() == []
    features, valid = cache.lookup(np.array([0]), np.array([0]), 8)
    assert features.shape == (1, 4)
    assert not valid.any()


def test_a_cache_that_does_not_fit_says_what_differs(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    with pytest.raises(UsageError, match=r"computed by 'tower/.*needs 'other'"):
        FeatureCache.open(folder, "other", shards, [8])
    with pytest.raises(UsageError, match="computed by"):
        write_manifest(folder, "other", 4, shards)
    with pytest.raises(UsageError, match=r"width 4.*gives 5"):
        write_manifest(folder, TOWER, 5, shards)
    write_tar(Path(shards[0]), [*sample("z", 1)])
    with pytest.raises(UsageError, match=r"shard '0000' had \d+ bytes"):
        FeatureCache.open(folder, TOWER, shards, [8])


def test_same_size_and_other_samples_are_noticed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", sample("a", 1))
    fill(tmp_path / "cache", [shard], (8,))
    write_tar(Path(shard), sample("b", 1))
    cache = FeatureCache.open(tmp_path / "cache", TOWER, [shard], [8])
    with pytest.raises(UsageError, match="does not have"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    with pytest.raises(UsageError, match="other samples"):
        write_shard_features(tmp_path / "cache", "0", 16, ["b"], np.zeros((1, 4), np.float32))


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    (folder / "0000.p8.npy").write_bytes(b"junk")
    cache = FeatureCache.open(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match="no array"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    np.save(folder / "0000.p8.npy", np.zeros((2, 4), np.float32))
    cache = FeatureCache.open(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match=r"\(2, 4\).*\(5, 4\)"):
        cache.lookup(np.array([0]), np.array([0]), 8)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="no feature cache's manifest"):
        FeatureCache.open(folder, TOWER, shards, [8])
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="no manifest"):
        FeatureCache.open(folder, TOWER, shards, [8])


def test_nothing_in_a_cache_is_unpickled(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "cache"
    fill(folder, shards)
    np.save(folder / "0000.p8.npy", np.array([print], dtype=object), allow_pickle=True)
    cache = FeatureCache.open(folder, TOWER, shards, [8])
    with pytest.raises(UsageError, match="no array"):
        cache.lookup(np.array([0]), np.array([0]), 8)


def test_shards_of_one_file_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [("x.png", png(0))])
    shards = [f"{tmp_path}/{name}/0.tar" for name in ("a", "b")]
    with pytest.raises(UsageError, match="same file name"):
        FeatureCache.open(tmp_path / "cache", TOWER, shards, [8])
    with pytest.raises(UsageError, match="stream"):
        FeatureCache.open(tmp_path / "cache", TOWER, ["memory://x/0.tar"], [8])
