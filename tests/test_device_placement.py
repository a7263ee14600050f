"""What may run on a GPU keeps to one device: found with a stand-in, not with a GPU."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_boxes
import test_decoders
import test_flexify
import test_training
import torch
from conftest import TINY_TOWER
from gpu_stand_in import Gpu, gpu_stand_in
from gradients import build_model
from index_maker import clustered
from PIL import Image
from test_flexify import pictures  # noqa: F401

from contrastive import LitModel, load_vision_tower
from contrastive.dense.config import DecoderConfig, Kind
from contrastive.dense.loop import train_decoder
from contrastive.flexify.loop import flexify
from contrastive.image_features import in_parts
from contrastive.model.config import LossConfig
from contrastive.run.config import ZeroConfig
from contrastive.train.loop import train
from contrastive.train.micro_batch import find_micro_batch_size
from data.dense.layouts import load_dense
from retrieval import Searcher, TrainedDetector, TrainedSegmenter, ZeroShotSegmenter, load_dataset
from retrieval.evaluation.evaluate import evaluate
from retrieval.index.exact import ExactVectors, RunningBest
from retrieval.index.filters import Selection


class Engine:
    """In place of DeepSpeed's, which would look for the GPU itself."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])

    def __call__(self, *args: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with gpu_stand_in() as device:
        yield device


@pytest.fixture
def model(tiny_model: LitModel, gpu: torch.device) -> LitModel:
    return copy.deepcopy(tiny_model).to(gpu)


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    for loop in ("train", "dense", "flexify"):
        module = f"contrastive.{loop}.loop"
        monkeypatch.setattr(f"{module}.begin_or_resume", lambda net, *_: (Engine(net), 0))
        monkeypatch.setattr(f"{module}.save_checkpoint", lambda *_: None)
    monkeypatch.setattr("contrastive.distributed.ensure_group", lambda: None)


MISTAKES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "operator": lambda here, there: here + there,
    "product": lambda here, there: there @ here,
    "in place": lambda here, there: there.add_(here),
    "scalar of the GPU": lambda here, there: here * there.sum(),
    "joined": lambda here, there: torch.cat([here, there]),
    "index of the GPU": lambda here, there: here[there.long()],
    "assigned": lambda here, there: there.__setitem__(there > 0, here[0]),
    "numpy": lambda here, there: there.numpy(),
    "array": lambda here, there: np.asarray(there),
    "pinned": lambda here, there: there.pin_memory(),
    "product of integers": lambda here, there: there.long() @ there.long(),
    "layer": lambda here, there: torch.nn.Linear(3, 3)(there),
    "input": lambda here, there: torch.nn.Linear(3, 3).to("cuda")(here),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_raises_as_a_gpu_does(mistake: str, gpu: torch.device) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        MISTAKES[mistake](torch.ones(3, 3), torch.ones(3, 3, device=gpu))


def test_the_stand_in_allows_what_a_gpu_does_and_gives_its_types(gpu: torch.device) -> None:
    layer = torch.nn.Linear(3, 3).to(gpu)
    there = torch.from_numpy(np.ones((3, 3), np.float32)).to(gpu)
    assert there[torch.tensor([0, 1])].device == (there + torch.tensor(1.0)).device == gpu
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(there)
        assert out.dtype == torch.bfloat16
        assert out.softmax(-1).dtype == out.sum().dtype == torch.float32
    out.float().square().sum().backward()
    assert isinstance(layer.weight.grad, Gpu)
    assert layer.cpu().weight.detach().numpy().shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_any_size_and_shape(
    dtype: torch.dtype, model: LitModel, tiny_model: LitModel
) -> None:
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.1}
    pixels = torch.randint(256, (3, 3, 240, 240), dtype=torch.uint8)
    model.vision.to(dtype)
    for size in (48, 30, 16):
        expected = in_parts(tiny_model.vision, pixels, size)
        found = in_parts(model.vision, pixels, size)
        torch.testing.assert_close(found.float().cpu(), expected, **close)
    shapes = [(90, 200), (200, 90), (90, 200), (300, 310)]
    images = [Image.effect_noise(shape, 90).convert("RGB") for shape in shapes]
    for options in ({"max_tokens": 30}, {"patch_size": 48}):
        expected = tiny_model.encode_image(images, **options)
        torch.testing.assert_close(model.encode_image(images, **options).cpu(), expected, **close)
    assert model.encode([images[0], "a cat"]).shape == (2, model.embed_dim)


@pytest.mark.parametrize(
    ("kind", "packed", "changes"),
    [
        ("sigmoid", True, {"cached": True, "head": "mlp", "lora": 2}),
        ("softmax", True, {"cached": True, "head": "linear", "frozen": True}),
        ("sigmoid", False, {"positives": "caption"}),
        ("softmax", False, {"cached": True, "head": "mlp"}),
    ],
)
def test_text_towers_train(
    kind: Any,
    packed: bool,
    changes: dict[str, Any],
    tiny_text: str,
    emoji_shards: Path,
    tmp_path: Path,
    without_deepspeed: None,
) -> None:
    cfg = test_training.config(tmp_path, "run", tiny_text, emoji_shards, 0, steps=2)
    features = str(tmp_path / "cache") if changes.get("cached") else ""
    text = {name: changes[name] for name in ("lora", "frozen") if name in changes}
    cfg = replace(
        cfg,
        data=replace(cfg.data, features=features, num_workers=0),
        vision=replace(cfg.vision, head=changes.get("head", "none")),
        text=replace(cfg.text, **text),
        loss=LossConfig(kind=kind, positives=changes.get("positives", "pair")),
        zero=ZeroConfig(precision="bfloat16", micro_batch_size=8),
    )
    with gpu_stand_in((8, 0) if packed else (7, 5)) as gpu:
        folder = train(cfg)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert {line.get("texts_packed", packed) for line in lines} == {packed}
        assert LitModel.from_pretrained(folder / "model", gpu).encode_text(["a cat"]).is_cuda


def test_micro_batches_are_measured(tiny_text: str, gpu: torch.device) -> None:
    net = build_model(TINY_TOWER, tiny_text, LossConfig(), torch.float32, "mlp")
    net.to(gpu).text.train()
    assert find_micro_batch_size(net, 64, torch.bfloat16) in (1, 2, 4, 8, 16, 32, 64)


def test_a_tower_becomes_flexible(
    pictures: Path,  # noqa: F811
    tmp_path: Path,
    gpu: torch.device,
    without_deepspeed: None,
) -> None:
    folder = flexify(test_flexify.config(tmp_path, pictures, steps=2))
    assert load_vision_tower(str(folder / "model")).patch_sizes


@pytest.mark.parametrize("kind", ["linear", "mask_transformer", "mlp"])
def test_decoders_train_and_make_masks(
    kind: Kind, small_scenes: Path, tmp_path: Path, gpu: torch.device, without_deepspeed: None
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = test_decoders.config(tmp_path, "run", small_scenes, steps=2)
    folder = train_decoder(replace(cfg, decoder=DecoderConfig(kind, 64)), scenes)
    segmenter = TrainedSegmenter.from_pretrained(folder / "model", gpu)
    (mask,) = segmenter.predict(Image.new("RGB", (90, 70)), 48, shorter_side=480)
    assert mask.shape == (70, 90)


def test_boxes_are_learned_and_found(
    small_scenes: Path, model_dir: Path, model: LitModel, tmp_path: Path, without_deepspeed: None
) -> None:
    scenes = load_dense(small_scenes / "train")
    cfg = test_boxes.config(tmp_path, "run", small_scenes, model_dir, steps=2)
    folder = train_decoder(cfg, scenes, texts=test_boxes.texts(model, scenes))
    picture = Image.effect_noise((90, 70), 90).convert("RGB")
    for queries in (["a cat", "a dog"], [picture]):
        detector = TrainedDetector.from_pretrained(
            folder / "model", queries, threshold=0.0, device=model.device, model=model
        )
        assert detector.predict(picture, 48, shorter_side=480)[0]


def test_classes_are_told_and_parts_masked(
    model: LitModel, tiny_model: LitModel, emoji_shards: Path
) -> None:
    dataset = load_dataset("shards", emoji_shards / "heldout_captions")
    found, expected = (
        evaluate(each, dataset, [48], recall=True, num_workers=0) for each in (model, tiny_model)
    )
    assert found.recall == expected.recall
    assert found.accuracy == expected.accuracy
    picture = Image.effect_noise((90, 70), 90).convert("RGB")
    for options in ({}, {"value_path": True}, {"windows": (2,)}):
        of = (ZeroShotSegmenter(each, ["cat", "dog"], **options) for each in (model, tiny_model))
        (one,), (other,) = (segmenter.similarities(picture, 48) for segmenter in of)
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_searches_find_what_the_cpu_finds(
    emoji_index: Path, model: LitModel, tiny_model: LitModel
) -> None:
    gpu, cpu = (
        Searcher.load(emoji_index, each, device=where)
        for each, where in ((model, "cuda"), (tiny_model, "cpu"))
    )
    (expected,) = cpu.search(["a cat"], k=5)
    for queries in (["a cat"], [hit.image() for hit in expected]):
        for options in ({}, {"patch_size": 48}, {"patch_size": 48, "refine_patch_size": 24}):
            found, other = (each.search(queries, k=5, **options) for each in (gpu, cpu))
            assert [[hit.id for hit in row] for row in found] == [
                [hit.id for hit in row] for row in other
            ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [None, 0.5, 0.01])
def test_exact_search(dtype: str, share: float | None, gpu: torch.device) -> None:
    vectors, queries = clustered(3000, 48).astype(dtype), clustered(9, 48, seed=1)
    chosen = None if share is None else Selection.of(np.random.default_rng(0).random(3000) < share)
    answers = [
        ExactVectors(vectors, [where] * 2).nearest(queries, 10, chosen)
        for where in (gpu, torch.device("cpu"))
    ]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-5)
    best = RunningBest(queries, 10)
    for part in np.split(vectors, [300, 2000]):
        best.add(torch.from_numpy(part).to(gpu))
    if chosen is None:
        np.testing.assert_array_equal(best.rows(), answers[0][1])
