"""A head over the text tower, and a tower that stays as it is, whose vectors are cached."""

import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import TINY_TOWER
from shard_maker import write_tar
from test_head import exportable

from contrastive import LitModel
from contrastive.export.export_model import MIN_COSINE, export_model
from contrastive.model.config import LossConfig
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.train.config import TrainConfig
from contrastive.train.loop import train
from contrastive.train.step import TrainStep
from contrastive.vision.config import VisionConfig
from data.cache.text_vectors import TextVectorCache
from data.config import DataConfig
from data.errors import UsageError

TEXTS = ["a red bicycle", "two dogs", "a happy cat"]


def with_text_head(text: str) -> LitModel:
    model = exportable(text, "linear")
    torch.manual_seed(1)
    encoder = TextEncoder(load_text_tower(TextConfig(text)), model.embed_dim, "mlp").eval()
    encoder.projection.load_state_dict(model.text.encoder.projection.state_dict())
    before = model.encode_text(TEXTS)
    model.text.encoder = encoder
    assert torch.equal(model.encode_text(TEXTS), before)  # it starts at what none gives
    torch.nn.init.normal_(encoder.head.out.weight, std=0.3)
    assert not torch.allclose(model.encode_text(TEXTS), before, atol=1e-3)
    return model


def test_a_text_head_is_saved_and_exported_where_there_is_room(tiny_text, tmp_path):
    model = with_text_head(tiny_text)
    model.save_pretrained(tmp_path / "model")
    again = LitModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert again.text_fingerprint == model.text_fingerprint
    assert "32 tokens under a gated MLP" in (tmp_path / "model/README.md").read_text()
    for to in ("open_clip", "transformers"):
        with pytest.raises(UsageError, match=f"{to} cannot express this model's text head"):
            export_model(model, to, 28, tmp_path / to)
    assert min(export_model(model, "onnx", 28, tmp_path / "onnx")) >= MIN_COSINE


def config(out: Path, shards: Path, text: str, **changes) -> TrainConfig:
    cfg = TrainConfig(
        name="plain",
        out=str(out),
        data=DataConfig((f"{shards}/train/*.tar",), num_workers=0),
        vision=VisionConfig(tower=TINY_TOWER, patch_sizes=(48,)),
        text=TextConfig(text, context_length=12, frozen=True, head="mlp"),
        loss=LossConfig(kind="softmax"),
        optim=OptimConfig(name="sgd", lr=0.1, clip_norm=0.0),
        zero=ZeroConfig(micro_batch_size=8),
        global_batch_size=16,
        init_samples=32,
        steps=3,
    )
    return dataclasses.replace(cfg, **changes)


@pytest.mark.parametrize("several", [1, 3])
def test_cached_vectors_of_a_frozen_tower_train_what_the_tower_does(
    several, tiny_text, emoji_shards, tmp_path
):
    cfg = config(tmp_path, emoji_shards, tiny_text)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, captions_per_image=several))
    plain = LitModel.from_pretrained(train(cfg) / "model")
    data = dataclasses.replace(cfg.data, features=str(tmp_path / "cache"))
    read = []
    with patch.object(TrainStep, "__call__", noting_reads(TrainStep.__call__, read)):
        folder = train(dataclasses.replace(cfg, name="cached", data=data))
    assert len(read) == cfg.steps
    assert not any(read)
    cached = LitModel.from_pretrained(folder / "model")
    assert any(name.suffix == ".npy" and ".vectors." in name.name for name in files(data))
    before = load_text_tower(cfg.text).state_dict()
    for name, value in cached.text.encoder.tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert cached.text.encoder.head.out.weight.any()
    for name, value in plain.text.state_dict().items():
        torch.testing.assert_close(cached.text.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def files(data: DataConfig) -> list[Path]:
    return [*Path(data.features).iterdir()]


def noting_reads(call, read: list[int]):
    """`call`, and how often the text tower ran in each."""

    def step(self, *args):
        count = 0

        def noted(*_):
            nonlocal count
            count += 1

        with self.model.text.encoder.tower.register_forward_hook(noted):
            share = call(self, *args)
        read.append(count)
        return share

    return step


def test_a_frozen_tower_takes_no_flag_that_trains_it():
    with pytest.raises(UsageError, match=r"text\.frozen keeps the whole tower"):
        TextConfig(frozen=True, decay_to_start=1.0)
    with pytest.raises(UsageError, match=r"text\.dropout to 0"):
        TextConfig(frozen=True, dropout=0.1)


def test_vectors_of_another_number_of_captions_are_made_again(tmp_path):
    shard = tmp_path / "0.tar"
    write_tar(shard, [("a.txt", b"a cat")])
    cache = TextVectorCache(tmp_path / "cache", [str(shard)], "tower")
    assert cache.missing(0, 3)
    (tmp_path / "cache").mkdir()
    cache.write(0, np.zeros((3, 4), dtype=np.float32))
    assert not cache.missing(0, 3)
    assert cache.missing(0, 4)
