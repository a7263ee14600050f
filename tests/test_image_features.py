"""The feature cache: what it gives is what the tower would have said."""

import dataclasses
import io
import os
import shutil
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER
from PIL import Image
from shard_maker import png, write_tar
from test_caption_cache import Letters
from test_training import config, weights

from contrastive import LitModel, load_vision_tower
from contrastive.image_features import FeatureSource, images_read_together
from contrastive.model.config import LossConfig
from contrastive.model.with_fit import with_fit
from contrastive.text_features import fill_texts
from contrastive.train.loop import train
from contrastive.vision.earlier import keep_cached_transform
from data.config import DataConfig, suited_workers
from data.errors import UsageError
from data.pipeline.captioned import CaptionedPipeline

SIZES = (48, 30)


@pytest.fixture
def data(emoji_shards, tmp_path) -> DataConfig:
    shards = (f"{emoji_shards}/train/*.tar",)
    return DataConfig(shards=shards, features=str(tmp_path / "cache"), num_workers=0)


def pipeline(cfg: DataConfig, tower_transform) -> CaptionedPipeline:
    options = {"seed": 0, "global_batch_size": 8, "rank": 0, "world_size": 1}
    return CaptionedPipeline(cfg, None if cfg.features else tower_transform, **options)


def batches(cfg: DataConfig, tower_transform, steps: int = 3):
    return pipeline(cfg, tower_transform).batches(0, steps)


def test_cached_features_are_those_of_the_tower_in_the_same_order(data):
    tower = load_vision_tower(TINY_TOWER)
    cached = FeatureSource(tower, data, SIZES)
    plain_cfg = dataclasses.replace(data, features="")
    plain = FeatureSource(tower, plain_cfg, SIZES)
    both = zip(batches(data, tower.transform), batches(plain_cfg, tower.transform), strict=True)
    for without_pixels, with_pixels in both:
        assert without_pixels.images is None
        assert without_pixels.keys == with_pixels.keys
        assert without_pixels.captions == with_pixels.captions
        for size in SIZES:
            got, valid = cached(without_pixels, size)
            expected, _ = plain(with_pixels, size)
            assert valid.all()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_fill_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    tower = load_vision_tower(TINY_TOWER)
    FeatureSource(tower, data, SIZES)
    files = sorted((tmp_path / "cache").glob("*.npy"))
    kept = {file: (file.stat().st_mtime_ns, np.load(file)) for file in files}
    lost = files[0]
    lost.unlink()
    FeatureSource(tower, data, SIZES)
    assert np.array_equal(np.load(lost), kept[lost][1])
    assert all(file.stat().st_mtime_ns == kept[file][0] for file in files[1:])
    monkeypatch.setattr("contrastive.image_features.start_features", pytest.fail)
    FeatureSource(tower, data, SIZES)  # complete: nothing is computed


def test_a_cache_of_another_tower_is_refused(data):
    tower = load_vision_tower(TINY_TOWER)
    FeatureSource(tower, data, SIZES)
    tower.net.norm.weight.data[0] += 1
    words = "was computed by weights [0-9a-f]{16}, this run has weights [0-9a-f]{16}, name another"
    with pytest.raises(UsageError, match=words):
        FeatureSource(tower, data, SIZES)
    tower.to(torch.bfloat16)
    words = "was computed by dtype float32, this run has dtype bfloat16, name another folder"
    with pytest.raises(UsageError, match=words):
        FeatureSource(tower, data, SIZES)


def test_a_cache_of_an_earlier_transform_is_used_with_it(data, monkeypatch):
    FeatureSource(load_vision_tower(TINY_TOWER).use_transform(1), data, SIZES)
    tower = load_vision_tower(TINY_TOWER)
    words = "was computed by version of the transform 1, this run has version of the transform 2"
    with pytest.raises(UsageError, match=words):
        FeatureSource(tower, data, SIZES)
    assert keep_cached_transform(tower, data.features)
    monkeypatch.setattr("contrastive.image_features.start_features", pytest.fail)
    FeatureSource(tower, data, SIZES)
    assert not keep_cached_transform(tower, "")


def test_a_cache_of_larger_images_is_refused(data):
    tower = load_vision_tower(TINY_TOWER)
    FeatureSource(tower, data, SIZES)
    words = r"was computed with data\.max_pixels 100000000, this run has 1000000, name another"
    with pytest.raises(UsageError, match=words):
        FeatureSource(tower, dataclasses.replace(data, max_pixels=1_000_000), SIZES)


def test_training_is_the_same_with_and_without_the_cache(emoji_shards, tiny_text, tmp_path):
    runs = {}
    for name, features in (("cached", str(tmp_path / "cache")), ("plain", "")):
        cfg = config(tmp_path, name, tiny_text, emoji_shards, 0, eval_every=0)
        shards = dataclasses.replace(cfg.data, features=features, num_workers=0)
        cfg = dataclasses.replace(cfg, data=shards, loss=LossConfig(positives="caption"))
        runs[name] = weights(train(cfg))
    for name, value in runs["plain"].items():
        torch.testing.assert_close(runs["cached"][name], value, rtol=1e-3, atol=2e-5)


def test_bad_images_are_left_out_of_cached_and_uncached_steps_alike(tmp_path):
    import tarfile

    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for number in range(8):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "png")
            image = b"no image at all" if number == 3 else buffer.getvalue()
            for ext, content in (("png", image), ("txt", b"caption %d" % number)):
                info = tarfile.TarInfo(f"{number}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    tower = load_vision_tower(TINY_TOWER)
    seen = []
    for features in (str(tmp_path / "cache"), ""):
        cfg = DataConfig(shards=(str(tmp_path / "some.tar"),), features=features, num_workers=0)
        source = FeatureSource(tower, cfg, (48,))
        (batch,) = batches(cfg, tower.transform, steps=1)
        _, valid = source(batch, 48)
        assert source.bad_images == (1 if features else 0)
        assert batch.errors == ({} if features else {"not_an_image": 1})
        seen.append([key for key, good in zip(batch.keys, valid.tolist(), strict=True) if good])
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == [str(n) for n in range(8) if n != 3]
    strict = dataclasses.replace(cfg, features=str(tmp_path / "cache"), on_error="raise")
    with pytest.raises(UsageError, match="1 images of these shards could not be read"):
        FeatureSource(tower, strict, (48,))


def test_augmented_views_are_what_the_tower_says_of_them(data):
    """Cached and uncached, and with files of their own that the plain ones survive."""
    tower = load_vision_tower(TINY_TOWER)
    FeatureSource(tower, data, (48,))
    viewed = dataclasses.replace(data, views=3, crop=0.4, flip=True)
    cached = FeatureSource(tower, viewed, (48,))
    plain_cfg = dataclasses.replace(viewed, features="")
    plain = FeatureSource(tower, plain_cfg, (48,))
    seen = set()
    both = zip(
        batches(viewed, tower.transform, 30), batches(plain_cfg, tower.transform, 30), strict=True
    )
    for without_pixels, with_pixels in both:
        got, valid = cached(without_pixels, 48)
        expected, _ = plain(with_pixels, 48)
        assert valid.all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        seen |= set(without_pixels.views.tolist())
    assert seen == {0, 1, 2}


def test_features_come_ahead_and_in_order(data):
    tower = load_vision_tower(TINY_TOWER)
    source = FeatureSource(tower, dataclasses.replace(data, features=""), SIZES)
    cfg = dataclasses.replace(data, features="")
    asked = []

    def noted(steps):
        for batch in batches(cfg, tower.transform, steps):
            asked.append(batch.step)
            yield [batch]

    ahead = source.ahead(noted(3), lambda step: SIZES[step % 2])
    whole = batches(cfg, tower.transform, 3)
    for step, (batch, features, valid) in enumerate(ahead):
        assert batch.step == step
        assert batch.images is None
        assert asked == list(range(min(step + 2, 3)))  # the next batch was asked for too
        with_pixels = next(whole)
        assert batch.keys == with_pixels.keys
        expected, _ = source(with_pixels, SIZES[step % 2])
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        assert valid.all()


def test_cached_features_come_from_a_thread_that_ends_with_the_loop(data):
    tower = load_vision_tower(TINY_TOWER)
    source = FeatureSource(tower, data, SIZES)
    fill_texts(data, Letters())
    options = {"seed": 0, "global_batch_size": 12, "rank": 0, "world_size": 1}
    pipeline = CaptionedPipeline(data, None, tokenizer=Letters(), **options)
    state = torch.get_rng_state()
    ahead = source.ahead(pipeline.steps(2, 100), lambda step: SIZES[step % 2])
    for expected, (batch, features, valid) in zip(pipeline.batches(2, 3), ahead, strict=False):
        assert batch.step == expected.step
        assert batch.keys == expected.keys
        assert batch.tokens.tolist() == expected.tokens.tolist()
        known, good = source(expected, SIZES[batch.step % 2])
        assert torch.equal(features, known)
        assert torch.equal(valid, good)
    assert [t for t in threading.enumerate() if t.name == "prefetch"]
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UsageError, match=r"no '.*p16\.npy'"):  # the thread's error
        next(source.ahead(pipeline.steps(0, 2), lambda _: 16))


def test_the_pixels_of_a_step_are_never_in_memory_together(data, monkeypatch):
    """However large the batch: what is held is its features, and the part that is being read."""
    monkeypatch.setattr("data.pipeline.training.PART_SAMPLES", 2)
    cfg = dataclasses.replace(data, features="")
    tower = load_vision_tower(TINY_TOWER)
    held: list[weakref.ref] = []

    def noted(parts):
        for part in parts:
            held.append(weakref.ref(part.images))
            yield part
            del part
            assert sum(pixels() is not None for pixels in held) <= 1

    source = FeatureSource(tower, cfg, SIZES)
    steps = pipeline(cfg, tower.transform).parts(0, 3)
    ahead = source.ahead(map(noted, steps), lambda step: SIZES[0])
    assert [len(batch) for batch, _, _ in ahead] == [8, 8, 8]
    assert len(held) == 12


SHAPES = ((48, 40), (30, 96), (90, 20), (64, 64), (50, 2), (48, 40), (96, 30), (33, 70))
"""Widths and heights."""


@pytest.fixture
def shaped(tmp_path) -> DataConfig:
    """Pictures of several shapes, one of them unreadable."""
    members = []
    for number, shape in enumerate(SHAPES):
        image = b"no image at all" if number == 3 else png(number, shape)
        members += [(f"{number}.png", image), (f"{number}.txt", b"caption %d" % number)]
    shard = write_tar(tmp_path / "shapes.tar", members)
    return DataConfig(shards=(shard,), features=str(tmp_path / "shapes"), num_workers=0)


def test_cached_features_of_whole_pictures_are_those_of_encode_image(shaped, tiny_model):
    model = with_fit(tiny_model, "aspect")
    viewed = dataclasses.replace(shaped, views=2, crop=0.4, flip=True)
    source = FeatureSource(model.vision, viewed, SIZES)
    for batch in batches(viewed, None, steps=4):
        for size in SIZES:
            features, valid = source(batch, size)
            assert valid.tolist() == [key != "3" for key in batch.keys]
            pictures = []
            for key, view in zip(batch.keys, batch.views.tolist(), strict=True):
                if key != "3":
                    picture = Image.open(io.BytesIO(png(int(key), SHAPES[int(key)])))
                    pictures.append(viewed.augment(picture, key, view))
            wanted = model.encode_image(pictures, patch_size=size)
            found = model.embed_features(features[valid])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="was computed by fit aspect, this run has fit crop, name"):
        FeatureSource(tiny_model.vision, viewed, SIZES)


def test_a_text_tower_trained_on_whole_pictures_is_served_them(shaped, tiny_text, tmp_path):
    cfg = config(tmp_path, "run", tiny_text, tmp_path, 0, eval_every=0, data=shaped, steps=3)
    vision = dataclasses.replace(cfg.vision, fit="aspect")
    sizes = {"global_batch_size": 8, "init_samples": 8, "checkpoint_every": 2}
    cfg = dataclasses.replace(cfg, vision=vision, **sizes)
    folder = train(cfg)
    model, after = LitModel.from_pretrained(folder / "model"), weights(folder)
    assert model.transform.fit == "aspect"
    assert "reads pictures of any shape whole" in (folder / "model" / "README.md").read_text()
    source = FeatureSource(model.vision, shaped, SIZES)  # the cache is that of the model
    (batch,) = batches(shaped, None, steps=1)
    features, valid = source(batch, 48)
    good = [int(key) for key, ok in zip(batch.keys, valid.tolist(), strict=True) if ok]
    pictures = [Image.open(io.BytesIO(png(number, SHAPES[number]))) for number in good]
    served = model.encode_image(pictures, patch_size=48)
    torch.testing.assert_close(model.embed_features(features[valid]), served, rtol=1e-5, atol=1e-5)
    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    train(cfg, resume=True)
    assert all(torch.equal(value, after[name]) for name, value in weights(folder).items())
    other = dataclasses.replace(cfg, vision=dataclasses.replace(vision, fit="crop"))
    with pytest.raises(UsageError, match="was trained with image tower"):
        train(other, resume=True)


def test_without_a_cache_a_tower_of_whole_pictures_trains_on_squares_alone(
    shaped, tiny_model, tiny_text, tmp_path
):
    with_fit(tiny_model, "aspect").save_pretrained(tmp_path / "model")
    data = dataclasses.replace(shaped, features="")
    cfg = config(tmp_path, "run", tiny_text, tmp_path, 0, eval_every=0, data=data, steps=2)
    vision = dataclasses.replace(cfg.vision, tower=str(tmp_path / "model"))
    cfg = dataclasses.replace(cfg, vision=vision, global_batch_size=8, init_samples=0)
    with pytest.raises(UsageError, match=r"fit aspect .* name their folder by data\.features"):
        train(cfg)
    squash = dataclasses.replace(vision, fit="squash")
    folder = train(dataclasses.replace(cfg, vision=squash))
    assert LitModel.from_pretrained(folder / "model").transform.fit == "squash"


@pytest.mark.parametrize(("mebibytes", "images"), [(64, 64), (24_576, 512)])
def test_what_a_worker_hands_over_for_a_gpu_fits_the_shared_memory(mebibytes, images, monkeypatch):
    """A container's 64 MiB by default hold not one batch of 512 images, but five of 64."""
    disk = SimpleNamespace(f_blocks=mebibytes * 256, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert images_read_together(torch.device("cuda")) == images
    assert images_read_together(torch.device("cpu")) == 64


@pytest.mark.parametrize(
    ("cores", "ranks", "mebibytes", "workers"),
    [
        (2, 1, 12_000, 2),
        (16, 1, 64_000, 14),
        (128, 8, 500_000, 14),
        (128, 1, 500_000, 16),
        (16, 1, 64, 2),
        (16, 1, 1024, 4),
        (16, 2, 1024, 2),
        (16, 1, None, 14),
    ],
)
def test_loaders_suit_the_cores_and_the_shared_memory(cores, ranks, mebibytes, workers):
    shared = None if mebibytes is None else mebibytes * 2**20
    assert suited_workers(cores, ranks, shared) == workers
