"""Decoders over the patches of a locked tower: trained at several patch sizes, used at any."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER
from safetensors.torch import load_file

from contrastive import load_vision_tower
from contrastive.dense.config import DecoderConfig, DenseConfig, Kind, PicturesConfig
from contrastive.dense.decoder_folder import load_decoder
from contrastive.dense.decoders import build_decoder
from contrastive.dense.loop import train_decoder
from contrastive.run.config import OptimConfig
from contrastive.vision.config import VisionConfig
from data.dense.layouts import load_dense
from data.errors import UsageError
from retrieval.dense.evaluate_dense import evaluate_dense
from retrieval.dense.trained import TrainedSegmenter

KINDS: tuple[Kind, ...] = ("linear", "mask_transformer", "mlp")
STEPS = 6


def config(out: Path, name: str, scenes: Path, **changes: Any) -> DenseConfig:
    cfg = DenseConfig(
        name=name,
        out=str(out),
        data=PicturesConfig(str(scenes / "train")),
        vision=VisionConfig(tower=TINY_TOWER, features="mean", patch_sizes=(48, 40)),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        global_batch_size=3,
        steps=STEPS,
        log_every=1,
        checkpoint_every=3,
    )
    return replace(cfg, **changes)


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def trained(small_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_decoder(
        config(tmp_path_factory.mktemp("decoders"), "whole", small_scenes),
        load_dense(small_scenes / "train"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_reads_any_grid_and_no_patch_sees_another_picture(kind: Kind) -> None:
    torch.manual_seed(0)
    decoder = build_decoder(DecoderConfig(kind, 64), [24, 8], 5).eval()
    for rows, columns in ((1, 1), (3, 5), (16, 16)):
        features = torch.randn(2, rows, columns, 32)
        both = decoder(features)
        assert both.shape == (2, 5, rows, columns)
        torch.testing.assert_close(decoder(features[:1]), both[:1])


def test_training_learns_and_is_read_back(trained: Path, small_scenes: Path) -> None:
    found = losses(trained)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    segmenter = TrainedSegmenter.from_pretrained(trained / "model")
    scenes = load_dense(small_scenes / "train")
    assert segmenter.class_names == list(scenes.class_names)
    picture = scenes.pictures.load(0).image.resize((90, 70))
    for size in (48, 24):  # at a patch size too that training did not draw
        (mask,) = segmenter.predict(picture, size)
        assert mask.shape == (70, 90)
        (logits,) = segmenter.logits(picture, size)
        assert mask.max() < logits.shape[2] == len(scenes.class_names) + 1
    result = evaluate_dense(segmenter, scenes, [48])
    assert result.num_images == 3


def test_cached_features_train_what_the_tower_trains(
    trained: Path, small_scenes: Path, tmp_path: Path
) -> None:
    data = PicturesConfig(str(small_scenes / "train"), features=str(tmp_path / "features"))
    scenes = load_dense(small_scenes / "train")
    folder = train_decoder(config(tmp_path, "cached", small_scenes, data=data), scenes)
    np.testing.assert_allclose(losses(folder), losses(trained), rtol=1e-2)  # kept in float16
    tower = load_vision_tower(TINY_TOWER, features="cls")
    other = config(tmp_path, "other", small_scenes, data=data)
    with pytest.raises(UsageError, match="were computed with tower"):
        train_decoder(replace(other, vision=replace(other.vision, features="mean@1")), scenes)
    with pytest.raises(UsageError, match="its patches mean something else"):
        load_decoder(folder / "model", tower)


def test_a_resumed_run_ends_with_the_same_weights(
    trained: Path, small_scenes: Path, tmp_path: Path
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = config(tmp_path, "whole", small_scenes)

    def stop(step: int, decoder: object) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        train_decoder(replace(cfg, eval_every=1), scenes, [stop])
    train_decoder(replace(cfg, eval_every=1), scenes, [lambda step, decoder: {}], resume=True)
    expected = load_file(trained / "model" / "model.safetensors")
    found = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_an_evaluation_that_fails_costs_no_training(small_scenes: Path, tmp_path: Path) -> None:
    def fail(step: int, decoder: object) -> dict[str, float]:
        raise InterruptedError

    cfg = config(tmp_path, "run", small_scenes, steps=1, eval_every=1)
    with pytest.raises(InterruptedError):
        train_decoder(cfg, load_dense(small_scenes / "train"), [fail])
    assert load_decoder(tmp_path / "run" / "model").patch_sizes == (48, 40)


def test_what_cannot_work_is_said_before_anything_is_built(
    small_scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"decoder\.width 100: .*multiples of 64"):
        DecoderConfig("mask_transformer", 100)
    vision = VisionConfig(tower=TINY_TOWER, features="mean", patch_sizes=(47,))
    with pytest.raises(UsageError, match="47"):
        train_decoder(
            config(tmp_path, "run", small_scenes, vision=vision), load_dense(small_scenes / "train")
        )
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_in_cached_features_is_noticed(small_scenes: Path, tmp_path: Path) -> None:
    data = PicturesConfig(str(small_scenes / "train"), features=str(tmp_path / "features"))
    scenes = load_dense(small_scenes / "train")
    train_decoder(config(tmp_path, "first", small_scenes, data=data, steps=1), scenes)
    file = tmp_path / "features" / "p48.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match=r"p48\.npy cannot be read"):
        train_decoder(config(tmp_path, "second", small_scenes, data=data), scenes)
    file.unlink()  # as it says
    train_decoder(config(tmp_path, "second", small_scenes, data=data), scenes)
