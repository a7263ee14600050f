"""A budget of tokens becomes a grid, and pictures of many shapes their embeddings."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from contrastive import LitModel, VisionTower
from contrastive.export.export_model import export_model
from contrastive.export.timm import export_timm
from contrastive.model.shaped import shaped_pixels
from contrastive.vision.grids import OFF_WEIGHT, PatchGrid, choose_grid
from contrastive.vision.tower_config import TowerConfig
from data.errors import UsageError
from data.transform import Fit

WIDE, TALL = (30, 60), (90, 45)  # height and width


@pytest.fixture
def model(tiny_model: LitModel) -> Iterator[LitModel]:
    """The shared model, which is left as it was."""
    config = tiny_model.vision.config
    yield tiny_model
    tiny_model.vision.config = config


def pictures() -> list[Image.Image]:
    shapes = (WIDE, TALL, (50, 50), WIDE, (7, 80))
    draw = np.random.default_rng(0).integers
    coarse = [draw(0, 255, (6, 6, 3), dtype=np.uint8) for _ in shapes]
    return [
        Image.fromarray(pixels).resize((width, height))
        for pixels, (height, width) in zip(coarse, shapes, strict=True)
    ]


@pytest.mark.parametrize(
    ("tokens", "side", "patch_size"),
    [(16, 4, 56), (36, 6, 37), (48, 6, 37), (49, 7, 32), (64, 8, 28), (100, 10, 22), (256, 16, 14)],
)
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_squares_use_what_a_square_can_use(
    tokens: int, side: int, patch_size: int, fit: Fit
) -> None:
    grid = choose_grid((30, 400), tokens, 224, fit)
    assert grid == PatchGrid(side, side, patch_size)
    assert grid.height == grid.width <= 224


def test_no_grid_loses_less_than_the_one_chosen() -> None:
    """Of all grids of the budget."""
    for tokens in (1, 5, 16, 48, 49, 64, 100):
        for aspect in (0.02, 0.4, 0.75, 1.0, 1.5, 2.0, 7.3, 200.0):

            def loss(rows: int, columns: int, aspect: float = aspect, all: int = tokens) -> float:
                off = math.log(rows / columns / aspect)
                return math.log(all / rows / columns) + OFF_WEIGHT * off**2

            grid = choose_grid((round(1000 * aspect), 1000), tokens, 224, "aspect")
            best = min(
                loss(rows, columns)
                for rows in range(1, tokens + 1)
                for columns in range(1, tokens // rows + 1)
            )
            assert grid.num_tokens <= tokens
            assert loss(grid.rows, grid.columns) <= best + 1e-6


def test_the_aspect_is_kept_and_turned_pictures_get_turned_grids() -> None:
    for tokens in (36, 49, 64, 100, 256):
        for height, width in ((300, 400), (480, 640), (500, 1000), (333, 500)):
            grid = choose_grid((height, width), tokens, 224, "aspect")
            turned = choose_grid((width, height), tokens, 224, "aspect")
            assert (turned.columns, turned.rows) == (grid.rows, grid.columns)
            assert grid.num_tokens >= 0.8 * tokens
            assert abs(math.log(grid.height * width / grid.width / height)) < 0.25
            assert grid.height * grid.width <= 224**2
        assert choose_grid((50, 50), tokens, 224, "aspect") == choose_grid((50, 50), tokens, 224)


@pytest.mark.parametrize("tokens", [0, -3, 224**2 + 1])
def test_impossible_budgets_are_one_sentence(tokens: int) -> None:
    with pytest.raises(UsageError, match=f"^max_tokens {tokens}: allowed are 1 to 50176$"):
        choose_grid(WIDE, tokens, 224)
    assert choose_grid((1, 9000), 1, 224, "aspect") == PatchGrid(1, 1, 224)
    assert choose_grid((1, 9000), 4, 224, "aspect", 16) == PatchGrid(1, 4, 16)


def test_a_square_budget_is_the_patch_size_of_that_grid(model: LitModel) -> None:
    wanted = model.encode_image(pictures(), 48)
    assert torch.equal(model.encode_image(pictures(), max_tokens=25), wanted)
    assert torch.equal(model.encode_image(pictures(), 48, max_tokens=35), wanted)
    assert (model.encode_image(pictures(), max_tokens=49) - wanted).abs().max() > 1e-3


def test_pictures_of_many_shapes_embed_as_they_do_alone(model: LitModel) -> None:
    plain = model.image_fingerprint
    crop = model.encode_image(pictures(), 48)
    model.vision.use_transform(fit="aspect")
    assert model.image_fingerprint != plain
    for size, budget in ((48, None), (None, 40), (30, 30)):
        together = model.encode_image(pictures(), size, budget)
        alone = [model.encode_image(picture, size, budget) for picture in pictures()]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    mixed = model.encode(["a cat", *pictures()], 30, max_tokens=30)
    np.testing.assert_allclose(mixed[1:], together, rtol=1e-5, atol=1e-5)
    assert (model.encode_image(pictures(), 48) - crop).abs().amax(1)[0] > 1e-3
    picture = model.transform.at(pictures()[0], 48 * 3, 48 * 7)  # of the 25 tokens that 5 x 5 has
    wanted = model.encode_image(model.transform.normalise(picture)[None], 48)
    torch.testing.assert_close(model.encode_image(pictures()[0], 48), wanted)


def test_normalised_rectangles_are_taken_together(model: LitModel) -> None:
    images = [torch.randn(3, *shape) for shape in ((48, 96), (240, 240), (48, 96), (96, 48))]
    wanted = torch.cat([model.encode_image(image[None], 24) for image in images])
    torch.testing.assert_close(model.encode_image(images, 24), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="max_tokens chooses how images are resized; pixels that"):
        model.encode_image(images[0][None], max_tokens=16)
    with pytest.raises(UsageError, match="max_tokens 0: allowed are 1 to 57600"):
        model.encode_image(pictures(), max_tokens=0)
    with pytest.raises(UsageError, match="patch size 0: at least 1 px"):
        model.encode_image(pictures(), 0, max_tokens=16)


def test_what_takes_squares_refuses_aspect_in_a_sentence(model: LitModel, tmp_path: Path) -> None:
    model.vision.use_transform(fit="aspect")
    model.save_pretrained(tmp_path / "model")
    again = LitModel.from_pretrained(tmp_path / "model")
    assert again.transform.fit == "aspect"
    assert again.image_fingerprint == model.image_fingerprint
    sentence = "fit aspect gives images of many shapes, .*; allowed here: crop, squash"
    with pytest.raises(UsageError, match=sentence):
        export_model(again, "onnx", 48, tmp_path / "out")
    with pytest.raises(UsageError, match=sentence):
        export_timm(again.vision, 48, tmp_path / "out")


def test_a_tower_with_one_patch_size_has_no_budget() -> None:
    net: Any = timm.create_model("resnet10t", num_classes=0)
    tower = VisionTower(net, TowerConfig("resnet10t", image_size=64)).lock()
    with pytest.raises(UsageError, match="resnet10t reads squares of 64 px at patch size 32 alone"):
        shaped_pixels(tower, pictures()[0], None, 16)
    assert shaped_pixels(tower, pictures()[0], None, None).pixels.shape == (3, 64, 64)
